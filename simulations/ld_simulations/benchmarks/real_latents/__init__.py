"""Latent drift in the latent space of a published autoencoder, measured on real scans that lie outside the project."""
