"""Sample quality with and without latent drift, for every adapter."""
