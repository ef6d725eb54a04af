"""Time and memory of Stable Diffusion 1.4's UNet."""
