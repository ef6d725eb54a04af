"""Latent drift: the shift δ between a general base model and medical images (arXiv 2412.20651).

A noise schedule that ends at a signal level a(T) > 0 leaks the mean of the data into the last latents: at the first
sampled timestep t0 the network expects z with mean a(t0)·E[z_0], a = sqrt(ᾱ). Sampling medical images from N(0, I)
therefore starts in the wrong place. The drift μ is the mean of the target latents minus the base's own mean. The
paper's δ, the shift of z_T itself, is δ = a(T)·μ. Formulations:

    formulation        forward z_t =            start of sampling   each of N steps   end
    prior (default)    a z_0 + s ε              N(a(t0) μ, I)       -                 -
    centred            a (z_0 - μ) + s ε        N(0, I)             -                 + μ
    noise              a z_0 + s (ε + δ)        N(δ, I)             ε̂ + δ             -
    per-step           a z_0 + s (ε + δ)        N(0, I)             + δ / N           -
    per-step-literal   a z_0 + s (ε + δ)        N(0, I)             + δ               -

The network's target stays ε (or its v) throughout. `per-step` is the paper's Eq. 4 with the total shift held at δ
for any N; `per-step-literal` adds δ at every step, as the equation is written. Without a drift, all functions return
the tensor that they were given.

A schedule that ends without signal, a(T) = 0, leaks nothing: flows, and β schedules of zero terminal SNR with trailing
timesteps. There all formulations but `centred` change nothing (`is_inert`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ld_common.core.errors import ConfigError
from ld_common.diffusion.flow import FLOW
from ld_common.diffusion.options import FORMULATIONS, SHAPES
from ld_common.diffusion.signal_level import latent_scale, signal_level

if TYPE_CHECKING:
    from ld_common.diffusion.base_model import BaseModel, Denoiser

INERT = (
    "this base's schedule ends without signal, so a drift changes nothing but with drift.formulation centred; a "
    "longitudinal drift and the editors that follow it work as with any base"
)
LEAST_SIGNAL = 1e-3
"""a(T) below which a schedule counts as one that ends without signal."""
RIDGE = 1e-3
"""Ridge penalty per scan on a conditional drift's coefficients; it decides where too few scans leave them open."""


@dataclass(frozen=True, eq=False)
class LatentDrift:
    """A latent drift μ and the formulation by which it enters.

    In code that is not ours, a drift of the default formulation `prior` only changes where sampling starts:

        latents = drift.initial_latents(pipe.scheduler, shape, generator)
        pipe(prompt, latents=latents)
    """

    mean: Tensor
    """μ in scaled latents, float32: `(1,1,1)`, `(C,1,1)` or `(C,h,w)`; `(B,C,h,w)` for one μ per image."""
    formulation: str = "prior"

    def __post_init__(self) -> None:
        if self.formulation not in FORMULATIONS:
            raise ConfigError(f"drift.formulation is '{self.formulation}': known: {', '.join(FORMULATIONS)}")

    @classmethod
    def estimate(
        cls, latents: Tensor, base: BaseModel, shape: str = "channel", formulation: str = "prior"
    ) -> LatentDrift:
        """The mean of some latents minus the mean of the base's own training latents.

        Args:
            latents: scaled latents `(N,C,h,w)` of the images to draw, as `TrainingData.latents` holds them.
            base: the base that encoded them.
            shape: of μ: `scalar` -> `(1,1,1)`, `channel` -> `(C,1,1)`, `map` -> `(C,h,w)`.
            formulation: how the drift enters; see the module's table.

        Raises:
            ConfigError: an unknown shape or formulation.
        """
        known = [name for name in SHAPES if name not in ("none", "conditional", "longitudinal")]
        if shape not in known:
            hint = "; ConditionalDrift.estimate fits a conditional one" if shape == "conditional" else ""
            raise ConfigError(f"shape is '{shape}': known: {', '.join(known)}{hint}")
        mean = drift_from_moments(latents, base.latent_mean, shape)
        assert mean is not None
        return cls(mean, formulation)

    def rows(self, which: slice | list[int]) -> LatentDrift:
        """The drift of some of a batch's images."""
        return self if self.mean.dim() == 3 else LatentDrift(self.mean[which], self.formulation)

    def initial_latents(
        self,
        scheduler: Any,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        num_inference_steps: int = 50,
    ) -> Tensor:
        """Latents to pass as `latents=` to a diffusers pipeline, so that it samples under this drift.

        The pipeline multiplies them by the scheduler's `init_noise_sigma`; the shift is divided by it here.

        Args:
            scheduler: the pipeline's DDIM, DPM-Solver++ or Euler scheduler; a copy is used.
            shape: `(B,C,h,w)`.
            generator: source of the noise; None takes torch's global one.
            num_inference_steps: the number that the pipeline is called with: it decides the first timestep.

        Returns:
            Standard normal noise plus the shift, float32, on the generator's device.

        Raises:
            ConfigError: a formulation that also changes later steps, which latents alone cannot do.
        """
        if self.formulation != "prior":
            raise ConfigError(
                f"formulation '{self.formulation}' changes more than the start of sampling: use 'prior', or "
                "sample with ld_common.diffusion.sampling"
            )
        noise = torch.randn(tuple(shape), generator=generator, device=None if generator is None else generator.device)
        timed = copy.deepcopy(scheduler)
        timed.set_timesteps(num_inference_steps)
        scale = latent_scale(timed, 0) * signal_level(timed, 0) / float(timed.init_noise_sigma)
        return noise + (scale * self.mean).to(noise)

    def training_noise(self, noise: Tensor, scheduler: Any) -> Tensor:
        """The noise to mix into the latents of a training step; the network's target stays `noise`.

        mixed = drift.training_noise(noise, scheduler)
        noisy = scheduler.add_noise(drift.training_latents(latents), mixed, timesteps)
        """
        return shift_noise(noise, self, scheduler.alphas_cumprod)

    def training_latents(self, latents: Tensor) -> Tensor:
        """The latents `(B,C,h,w)` that a training step mixes with noise; centred under formulation `centred`."""
        return centre(latents, self)


@dataclass(frozen=True, eq=False)
class ConditionalDrift:
    """A drift that depends on a scan's attributes: μ(c) = w_0 + Σ_k c_k w_k, with c the modality's `design_vector`.

    The schedule leaks E[z_0 | c], not E[z_0]: samples that start at the mean of all scans lean towards the mean
    patient, whatever their prompt.
    """

    coefficients: Tensor
    """w in scaled latents, float32 `(K+1,C,h,w)`; the base's mean is subtracted from w_0."""
    formulation: str = "prior"

    @classmethod
    def estimate(cls, latents: Tensor, base: BaseModel, design: Sequence[Sequence[float]]) -> ConditionalDrift:
        """Fit latents `(N,C,h,w)` to the `design_vector` `(N,K)` of each scan by ridge regression."""
        return cls(drift_from_attributes(latents, base.latent_mean, design))

    def at(self, design: Sequence[Sequence[float]]) -> LatentDrift:
        """The drift at these design vectors `(B,K)`: one μ each."""
        conditions = torch.tensor([[1.0, *row] for row in design])
        return LatentDrift(torch.einsum("bk,kchw->bchw", conditions, self.coefficients), self.formulation)


class DriftOfAttributes(Protocol):
    """A drift that depends on a scan's attributes."""

    def at(self, design: Sequence[Sequence[float]]) -> LatentDrift:
        """The drift at these design vectors `(B,K)`: one μ each."""


def at_designs(drift: LatentDrift | DriftOfAttributes | None, design: Sequence[Sequence[float]]) -> LatentDrift | None:
    """The drift at these design vectors; one that does not depend on attributes is returned as it is."""
    return drift if drift is None or isinstance(drift, LatentDrift) else drift.at(design)


def entering(mean: Tensor, formulation: str) -> LatentDrift | ConditionalDrift:
    """A drift from its tensor: `(K+1,C,h,w)` are the coefficients of a conditional one, three dimensions are a μ."""
    return ConditionalDrift(mean, formulation) if mean.dim() == 4 else LatentDrift(mean, formulation)


def drift_from_moments(latents: Tensor, base_mean: Tensor, shape: str) -> Tensor | None:
    """A site's drift μ: the mean of its scaled latents minus the base's, in float32.

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
    """Coefficients `(K+1,C,h,w)` of a conditional drift: a ridge regression of latents on attributes.

    Args:
        latents: scaled latents `(N,C,h,w)`.
        base_mean: the base's own mean by channel `(C,)`.
        design: the modality's `design_vector` of each scan, `(N,K)`.
    """
    conditions = torch.tensor([[1.0, *row] for row in design], dtype=torch.float64)
    penalty = RIDGE * len(latents) * torch.eye(conditions.shape[1], dtype=torch.float64)
    penalty[0, 0] = 0.0  # the mean itself is not shrunk
    flat = latents.double().flatten(1)
    solution = torch.linalg.solve(conditions.T @ conditions + penalty, conditions.T @ flat)
    coefficients = solution.view(-1, *latents.shape[1:])
    coefficients[0] -= base_mean.double()[:, None, None]
    return coefficients.float()


def drift_from_shift(delta: float, alphas_cumprod: Tensor) -> Tensor:
    """μ `(1,1,1)` of a δ in the paper's units, the shift of z_T itself: μ = δ / a(T).

    Raises:
        ConfigError: the schedule ends without signal (zero terminal SNR), so no μ gives a shift of z_T.
    """
    level = _last_signal_level(alphas_cumprod)
    if delta == 0:
        return torch.zeros(1, 1, 1)
    if level < LEAST_SIGNAL:
        raise ConfigError(f"drift {delta:g} cannot be converted: this base's schedule ends without signal (zero SNR)")
    return torch.full((1, 1, 1), delta / level)


def shift_of(drift: LatentDrift, alphas_cumprod: Tensor) -> Tensor:
    """δ = a(T)·μ, the paper's shift of z_T, in the shape of μ."""
    return _last_signal_level(alphas_cumprod) * drift.mean


def is_inert(formulation: str, model: Denoiser) -> bool:
    """Whether a drift of a formulation changes nothing: the base's schedule ends without signal."""
    return formulation != "centred" and _last_signal_level(model.scheduler.alphas_cumprod) < LEAST_SIGNAL


def by_channel(mean: Tensor) -> list[float]:
    """A drift's tensor summarised for people: its mean by latent channel; of a conditional one, that of w_0."""
    intercept = mean[0] if mean.dim() == 4 else mean
    return [float(value) for value in intercept.mean((-1, -2))]


def centre(latents: Tensor, drift: LatentDrift | None) -> Tensor:
    """Forward: the latents `(B,C,h,w)` that the network learns, minus μ under `centred`."""
    if drift is None or drift.formulation != "centred":
        return latents
    return latents - drift.mean.to(latents)


def restore(latents: Tensor, drift: LatentDrift | None) -> Tensor:
    """Reverse of `centre`, after the last step."""
    if drift is None or drift.formulation != "centred":
        return latents
    return latents + drift.mean.to(latents)


def shift_noise(noise: Tensor, drift: LatentDrift | None, alphas_cumprod: Tensor) -> Tensor:
    """Forward: the noise that is mixed into z_0, `ε + δ` under `noise` and `per-step`."""
    if drift is None or drift.formulation in ("prior", "centred"):
        return noise
    return noise + shift_of(drift, alphas_cumprod).to(noise)


def prior_shift(drift: LatentDrift | None, signal_level: float, alphas_cumprod: Tensor) -> Tensor | None:
    """Mean of z at the first sampled timestep, of signal level a(t0), in the shape of μ; None for N(0, I)."""
    if drift is None or drift.formulation not in ("prior", "noise"):
        return None
    return signal_level * drift.mean if drift.formulation == "prior" else shift_of(drift, alphas_cumprod)


def shift_output(
    output: Tensor,
    drift: LatentDrift | None,
    prediction_type: str,
    signal_level: float | Tensor,
    alphas_cumprod: Tensor,
) -> Tensor:
    """Reverse: a network's output whose noise is `ε̂ + δ`; under a flow, which ends without signal, δ is 0."""
    if drift is None or drift.formulation != "noise" or prediction_type in ("sample", FLOW):
        return output
    delta = shift_of(drift, alphas_cumprod)
    return output + (delta if prediction_type == "epsilon" else signal_level * delta).to(output)


def step_shift(drift: LatentDrift | None, steps: int, alphas_cumprod: Tensor) -> Tensor | None:
    """Reverse, Eq. 4: the tensor added to z after each of `steps` steps, or None."""
    if drift is None or not drift.formulation.startswith("per-step"):
        return None
    delta = shift_of(drift, alphas_cumprod)
    return delta if drift.formulation == "per-step-literal" else delta / steps


def mean_drift(drifts: Sequence[Tensor], weights: Sequence[float]) -> Tensor | None:
    """The weighted mean of the sites' drifts, summed in float64 in the given order; None without drifts."""
    if not drifts:
        return None
    total = sum(weights)
    stacked = torch.stack([drift.double() * (weight / total) for drift, weight in zip(drifts, weights, strict=True)])
    return stacked.sum(0).float()


def _last_signal_level(alphas_cumprod: Tensor) -> float:
    return float(alphas_cumprod[-1]) ** 0.5
