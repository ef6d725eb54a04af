"""Deterministic diffusion (DDIM, arXiv 2010.02502), both ways along one trajectory.

A latent at level i has signal `levels[i]` = ᾱ; level 0 is the noisiest, the last is the image's. Going down the
levels is sampling; going up is inversion, which finds the noise from which an image is sampled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from ld_common.drift import shift_prior
from ld_common.errors import ConfigError, ModelError

Epsilon = Callable[[Tensor, int], Tensor]
"""Noise in latents `(B,C,h,w)` as predicted at a timestep."""


@dataclass(frozen=True)
class Trajectory:
    """The timesteps of a sampler, noisiest first, and ᾱ at each and at the end: `len(timesteps) + 1` levels."""

    timesteps: list[int]
    levels: list[float]

    @property
    def signal_level(self) -> float:
        """a(t0) = sqrt(ᾱ) at the first sampled timestep."""
        return self.levels[0] ** 0.5


def trajectory(scheduler: DDIMScheduler, steps: int) -> Trajectory:
    """The scheduler's own timesteps, spacing and final level for a number of steps.

    Raises:
        ConfigError: more steps than the base's schedule has room for.
    """
    sampler = copy.deepcopy(scheduler)
    most = len(sampler.alphas_cumprod) - 1 - int(sampler.config["steps_offset"])
    if steps > most:
        raise ConfigError(f"steps is {steps}: this base allows at most {most}")
    sampler.set_timesteps(steps)
    timesteps = [int(timestep) for timestep in sampler.timesteps]
    levels = [float(sampler.alphas_cumprod[timestep]) for timestep in timesteps]
    return Trajectory(timesteps, [*levels, float(sampler.final_alpha_cumprod)])


def epsilon_model(unet: UNet2DConditionModel, scheduler: DDIMScheduler, context: Tensor) -> Epsilon:
    """The network under prompt embeddings `(B,L,D)` as a predictor of noise, whatever it was trained to predict."""
    kind = scheduler.config["prediction_type"]

    def epsilon(latents: Tensor, timestep: int) -> Tensor:
        output = unet(latents, timestep, context).sample
        if kind == "epsilon":
            return output
        signal = float(scheduler.alphas_cumprod[timestep])
        if kind == "v_prediction":
            return signal**0.5 * output + (1 - signal) ** 0.5 * latents
        if kind == "sample":
            return (latents - signal**0.5 * output) / (1 - signal) ** 0.5
        raise ModelError(f"prediction type '{kind}' is unknown: known: epsilon, v_prediction, sample")

    return epsilon


def step(latents: Tensor, epsilon: Tensor, signal: float, next_signal: float) -> Tensor:
    """One DDIM step between two signal levels ᾱ, in either direction (arXiv 2010.02502, Eq. 12 with σ = 0)."""
    clean = (latents - (1 - signal) ** 0.5 * epsilon) / signal**0.5
    return next_signal**0.5 * clean + (1 - next_signal) ** 0.5 * epsilon


@torch.no_grad()
def denoise(latents: Tensor, epsilon: Epsilon, path: Trajectory, start: int = 0) -> Tensor:
    """From latents `(B,C,h,w)` at level `start` down to the image's level."""
    for index in range(start, len(path.timesteps)):
        noise = epsilon(latents, path.timesteps[index])
        latents = step(latents, noise, path.levels[index], path.levels[index + 1])
    return latents


@torch.no_grad()
def invert(latents: Tensor, epsilon: Epsilon, path: Trajectory, start: int = 0, refinements: int = 0) -> Tensor:
    """From image latents `(B,C,h,w)` up to level `start`: the noise that `denoise` turns into them.

    Plain DDIM inversion takes the noise predicted one level too low. Each refinement predicts it again at the
    level just found, a fixed-point iteration towards the exact inverse of `denoise` (arXiv 2312.12540).
    """
    for index in reversed(range(start, len(path.timesteps))):
        below = latents
        for _ in range(refinements + 1):
            noise = epsilon(latents, path.timesteps[index])
            latents = step(below, noise, path.levels[index + 1], path.levels[index])
    return latents


def sample(epsilon: Epsilon, path: Trajectory, noise: Tensor, drift: Tensor | None = None) -> Tensor:
    """Latents `(B,C,h,w)` from N(0, I) noise, started at the drift's prior N(a(t0)·μ, I)."""
    return denoise(shift_prior(noise, drift, path.signal_level), epsilon, path)
