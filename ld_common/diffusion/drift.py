"""Latent drift: the shift δ between a general base model and medical images (arXiv 2412.20651).

A noise schedule that ends at a signal level a(T) > 0 leaks the mean of the data into the last latents: the
network has learned that at the first sampled timestep t0 the mean of z is a(t0)·E[z_0], with a = sqrt(ᾱ).
Sampling medical images from N(0, I) starts it in the wrong place. The drift μ is the mean of the target latents
less the base's own. The paper's δ, the shift of z_T itself, is δ = a(T)·μ. How the drift enters:

    formulation        forward z_t =            start of sampling   each of N steps   end
    prior (default)    a z_0 + s ε              N(a(t0) μ, I)       -                 -
    centred            a (z_0 - μ) + s ε        N(0, I)             -                 + μ
    noise              a z_0 + s (ε + δ)        N(δ, I)             ε̂ + δ             -
    per-step           a z_0 + s (ε + δ)        N(0, I)             + δ / N           -
    per-step-literal   a z_0 + s (ε + δ)        N(0, I)             + δ               -

The network's target stays ε (or its v) throughout. `per-step` is the paper's Eq. 4 with the total shift held at δ
whatever N; `per-step-literal` adds δ at every step, as the equation is written. All functions return their input
itself, the very same tensor, where there is no drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ld_common.core.errors import ConfigError
from ld_common.diffusion.options import FORMULATIONS

RIDGE = 1e-3
"""Weight, for each scan, of a conditional drift's squared coefficients: it settles what too few scans leave open."""


@dataclass(frozen=True, eq=False)
class LatentDrift:
    """A latent drift and the rule by which it enters."""

    mean: Tensor
    """μ in scaled latents, float32: `(1,1,1)`, `(C,1,1)` or `(C,h,w)`; `(B,C,h,w)` for one μ a picture."""
    formulation: str = "prior"

    def __post_init__(self) -> None:
        if self.formulation not in FORMULATIONS:
            raise ConfigError(f"drift.formulation is '{self.formulation}': known: {', '.join(FORMULATIONS)}")

    def rows(self, which: slice | list[int]) -> LatentDrift:
        """The drift of some of a batch's pictures."""
        return self if self.mean.dim() == 3 else LatentDrift(self.mean[which], self.formulation)


@dataclass(frozen=True, eq=False)
class ConditionalDrift:
    """A drift that follows what a picture shows: μ(c) = w_0 + Σ_k c_k w_k, c the modality's `design`.

    The leak is that of E[z_0 | c], not of E[z_0]: started at the mean of all scans, samples lean towards the mean
    patient, whatever their prompt says.
    """

    coefficients: Tensor
    """w in scaled latents, float32 `(K+1,C,h,w)`; w_0 less the base's mean."""
    formulation: str = "prior"

    def at(self, design: Sequence[Sequence[float]]) -> LatentDrift:
        """The drift of pictures with these designs `(B,K)`: one μ each."""
        conditions = torch.tensor([[1.0, *row] for row in design])
        return LatentDrift(torch.einsum("bk,kchw->bchw", conditions, self.coefficients), self.formulation)


def at_designs(drift: LatentDrift | ConditionalDrift | None, design: Sequence[Sequence[float]]) -> LatentDrift | None:
    """The drift of pictures with these designs, whatever kind it is."""
    return drift.at(design) if isinstance(drift, ConditionalDrift) else drift


def entering(mean: Tensor, formulation: str) -> LatentDrift | ConditionalDrift:
    """A drift from the tensor that travels: `(K+1,C,h,w)` is a conditional one's coefficients, `(C,h,w)` a μ."""
    return ConditionalDrift(mean, formulation) if mean.dim() == 4 else LatentDrift(mean, formulation)


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


def drift_from_attributes(latents: Tensor, base_mean: Tensor, design: Sequence[Sequence[float]]) -> Tensor:
    """Coefficients `(K+1,C,h,w)` of a conditional drift: a ridge regression of latents on what each scan shows.

    Args:
        latents: scaled latents `(N,C,h,w)`.
        base_mean: the base's own mean by channel `(C,)`.
        design: the modality's `design` of each scan, `(N,K)`.
    """
    conditions = torch.tensor([[1.0, *row] for row in design], dtype=torch.float64)
    penalty = RIDGE * len(latents) * torch.eye(conditions.shape[1], dtype=torch.float64)
    penalty[0, 0] = 0.0  # the mean itself is not shrunk
    flat = latents.double().flatten(1)
    found = torch.linalg.solve(conditions.T @ conditions + penalty, conditions.T @ flat)
    coefficients = found.view(-1, *latents.shape[1:])
    coefficients[0] -= base_mean.double()[:, None, None]
    return coefficients.float()


def drift_from_shift(delta: float, alphas_cumprod: Tensor) -> Tensor:
    """μ `(1,1,1)` of a δ in the paper's units, the shift of z_T itself: μ = δ / a(T).

    Raises:
        ConfigError: the schedule ends at zero signal, where no shift of z_T follows from any mean.
    """
    level = _last_signal_level(alphas_cumprod)
    if delta == 0:
        return torch.zeros(1, 1, 1)
    if level < 1e-3:
        raise ConfigError(f"drift {delta:g} cannot be converted: this base's schedule ends without signal (zero SNR)")
    return torch.full((1, 1, 1), delta / level)


def shift_of(drift: LatentDrift, alphas_cumprod: Tensor) -> Tensor:
    """δ = a(T)·μ, the paper's shift of z_T, in the shape of μ."""
    return _last_signal_level(alphas_cumprod) * drift.mean


def by_channel(mean: Tensor) -> list[float]:
    """A drift's tensor in a few numbers for people: its mean by latent channel, a conditional one's at design 0."""
    own = mean[0] if mean.dim() == 4 else mean
    return [float(value) for value in own.mean((-1, -2))]


def flow_signal_level(time: float) -> float:
    """a(t) of rectified flow, z_t = (1 - t) z_0 + t ε, to be used as any other signal level (arXiv 2209.03003)."""
    return 1.0 - time


def centre(latents: Tensor, drift: LatentDrift | None) -> Tensor:
    """Forward: latents `(B,C,h,w)` as the network shall learn them."""
    if drift is None or drift.formulation != "centred":
        return latents
    return latents - drift.mean.to(latents)


def restore(latents: Tensor, drift: LatentDrift | None) -> Tensor:
    """Reverse: the end of `centre`, after the last step."""
    if drift is None or drift.formulation != "centred":
        return latents
    return latents + drift.mean.to(latents)


def shift_noise(noise: Tensor, drift: LatentDrift | None, alphas_cumprod: Tensor) -> Tensor:
    """Forward: the noise that is mixed into z_0, `ε + δ` where the formulation says so."""
    if drift is None or drift.formulation in ("prior", "centred"):
        return noise
    return noise + shift_of(drift, alphas_cumprod).to(noise)


def prior_shift(drift: LatentDrift | None, signal_level: float, alphas_cumprod: Tensor) -> Tensor | None:
    """Mean of z at the first sampled timestep, of signal level a(t0), in the shape of μ; None for N(0, I)."""
    if drift is None or drift.formulation not in ("prior", "noise"):
        return None
    return signal_level * drift.mean if drift.formulation == "prior" else shift_of(drift, alphas_cumprod)


def shift_output(
    output: Tensor, drift: LatentDrift | None, prediction_type: str, signal_level: float, alphas_cumprod: Tensor
) -> Tensor:
    """Reverse: a network's output whose noise is `ε̂ + δ`, for `epsilon`, `v_prediction` and `sample` networks."""
    if drift is None or drift.formulation != "noise" or prediction_type == "sample":
        return output
    delta = shift_of(drift, alphas_cumprod)
    return output + (delta if prediction_type == "epsilon" else signal_level * delta).to(output)


def step_shift(drift: LatentDrift | None, steps: int, alphas_cumprod: Tensor) -> Tensor | None:
    """Reverse, Eq. 4: what is added to z after each of `steps` steps; None where the formulation adds nothing."""
    if drift is None or not drift.formulation.startswith("per-step"):
        return None
    delta = shift_of(drift, alphas_cumprod)
    return delta if drift.formulation == "per-step-literal" else delta / steps


def mean_drift(drifts: Sequence[Tensor], weights: Sequence[float]) -> Tensor | None:
    """The weighted mean of the sites' drifts, summed in float64 in the order given; None without drifts."""
    if not drifts:
        return None
    total = sum(weights)
    stacked = torch.stack([drift.double() * (weight / total) for drift, weight in zip(drifts, weights, strict=True)])
    return stacked.sum(0).float()


def _last_signal_level(alphas_cumprod: Tensor) -> float:
    return float(alphas_cumprod[-1]) ** 0.5
