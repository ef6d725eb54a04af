"""Latent drift: the shift δ between a general base model and medical images (arXiv 2412.20651).

A noise schedule that ends at a signal level a(T) > 0 leaks the mean of the data into the last latents: the
network has learned that at the first sampled timestep t0 the mean of z is a(t0)·E[z_0], with a = sqrt(ᾱ).
Sampling medical images from N(0, I) starts it in the wrong place. The drift μ is the mean of the target latents
less the base's own; it enters the prior: z_T ~ N(a(t0)·μ, I), so δ(t0) = a(t0)·μ holds at any number of steps.
Forward process, training target and the scheduler's step stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def drift_from_moments(latents: Tensor, base_mean: Tensor, shape: str) -> Tensor | None:
    """A site's drift μ: the mean of its scaled latents less the base's, in float32.

    Args:
        latents: scaled latents `(N,C,h,w)` of the site's images.
        base_mean: the base's own mean by channel `(C,)`.
        shape: `none`, `scalar` -> `(1,1,1)`, `channel` -> `(C,1,1)`, `map` -> `(C,h,w)`.
    """
    if shape == "none":
        return None
    difference = latents.double().mean(0) - base_mean.double()[:, None, None]
    if shape == "scalar":
        difference = difference.mean((0, 1, 2), keepdim=True)
    elif shape == "channel":
        difference = difference.mean((1, 2), keepdim=True)
    return difference.float()


def shift_prior(noise: Tensor, drift: Tensor | None, signal_level: float) -> Tensor:
    """Start of the reverse process: `noise + a(t0)·μ`, or the very same noise without drift.

    Args:
        noise: `(B,C,h,w)` from N(0, I).
        drift: μ, broadcastable to `(C,h,w)`, or None.
        signal_level: a(t0) = sqrt(ᾱ) at the first sampled timestep.
    """
    if drift is None:
        return noise
    return noise + (signal_level * drift).to(noise.dtype)


def mean_drift(drifts: Sequence[Tensor], weights: Sequence[float]) -> Tensor | None:
    """The weighted mean of the sites' drifts, summed in float64 in the order given; None without drifts."""
    if not drifts:
        return None
    total = sum(weights)
    stacked = torch.stack([drift.double() * (weight / total) for drift, weight in zip(drifts, weights, strict=True)])
    return stacked.sum(0).float()
