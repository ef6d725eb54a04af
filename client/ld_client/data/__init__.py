"""A hospital's scans as an index, a store of latents, and a list of exclusions."""
