"""Classes of base models beside Stable Diffusion 1 and 2, a file each."""
