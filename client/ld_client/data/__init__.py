"""What a hospital's scans become: an index, a store of latents, and a list of what was left out."""
