"""Deterministic diffusion (DDIM, arXiv 2010.02502): sampling and inversion along one schedule.

A latent at level i has signal `alphas_cumprod[i]` = ᾱ. Level 0 is the noisiest, the last one is the image's. Sampling
goes down the levels; inversion goes up and finds the noise from which an image is sampled.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ld_common.core.errors import ConfigError, ModelError
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.drift import LatentDrift, shift_output

if TYPE_CHECKING:
    from diffusers import DDIMScheduler


@dataclass(frozen=True, eq=False)
class Prediction:
    """The network's estimate of the image and the noise in latents `(B,C,h,w)` at a timestep."""

    pred_original_sample: Tensor
    pred_epsilon: Tensor


Predictor = Callable[[Tensor, int | Tensor], Prediction]
"""Of latents `(B,C,h,w)` at one timestep, or at one each `(B,)`."""


@dataclass(frozen=True)
class DdimSchedule:
    """The timesteps of a sampler, noisiest first, and ᾱ at each and at the end: `len(timesteps) + 1` levels."""

    timesteps: list[int]
    alphas_cumprod: list[float]


def ddim_schedule(scheduler: DDIMScheduler, steps: int) -> DdimSchedule:
    """The scheduler's timesteps, spacing and final level for a number of steps.

    Raises:
        ConfigError: more steps than the base's schedule has timesteps.
    """
    sampler = copy.deepcopy(scheduler)
    check_steps(scheduler, steps)
    sampler.set_timesteps(steps)
    timesteps = [int(timestep) for timestep in sampler.timesteps]
    levels = [float(sampler.alphas_cumprod[timestep]) for timestep in timesteps]
    return DdimSchedule(timesteps, [*levels, float(sampler.final_alpha_cumprod)])


def check_steps(scheduler: DDIMScheduler, steps: int) -> None:
    """Raise `ConfigError` for more steps than the base's schedule has timesteps."""
    most = len(scheduler.alphas_cumprod) - 1 - int(scheduler.config["steps_offset"])
    if not 0 < steps <= most:
        raise ConfigError(f"steps is {steps}: this base allows 1 to {most}")


def predictor(model: Denoiser, condition: Condition, drift: LatentDrift | None = None) -> Predictor:
    """The network under a condition and drift, for every prediction type."""
    kind, levels = model.scheduler.config["prediction_type"], model.scheduler.alphas_cumprod

    def predict(latents: Tensor, timestep: int | Tensor) -> Prediction:
        each = isinstance(timestep, Tensor)
        signal = levels[timestep].view(-1, 1, 1, 1).to(latents) if each else float(levels[timestep])
        output = model.unet(condition.network_input(latents), timestep, condition.context).sample
        output = shift_output(output, drift, kind, signal**0.5, levels)
        if kind == "epsilon":
            return Prediction((latents - (1 - signal) ** 0.5 * output) / signal**0.5, output)
        if kind == "v_prediction":
            clean = signal**0.5 * latents - (1 - signal) ** 0.5 * output
            return Prediction(clean, signal**0.5 * output + (1 - signal) ** 0.5 * latents)
        if kind == "sample":
            return Prediction(output, (latents - signal**0.5 * output) / (1 - signal) ** 0.5)
        raise ModelError(f"prediction type '{kind}' is unknown: known: epsilon, v_prediction, sample")

    return predict


def add_noise(prediction: Prediction, signal: float) -> Tensor:
    """Latents at signal level ᾱ of an image and its noise (arXiv 2010.02502, Eq. 12 with σ = 0)."""
    return signal**0.5 * prediction.pred_original_sample + (1 - signal) ** 0.5 * prediction.pred_epsilon


def noise_ratio(signal: float) -> float:
    """√((1-ᾱ)/ᾱ), the noise beside an image of unit weight at signal level ᾱ; infinite where there is no signal."""
    return ((1 - signal) / signal) ** 0.5 if signal > 0 else math.inf


@torch.no_grad()
def ddim_denoise(
    latents: Tensor, predict: Predictor, schedule: DdimSchedule, start: int = 0, shift: Tensor | None = None
) -> Tensor:
    """Go from latents `(B,C,h,w)` at level `start` down to the image's level, adding `shift` after each step."""
    for index in range(start, len(schedule.timesteps)):
        latents = add_noise(predict(latents, schedule.timesteps[index]), schedule.alphas_cumprod[index + 1])
        if shift is not None:
            latents = latents + shift.to(latents)
    return latents


@torch.no_grad()
def ddim_invert(
    latents: Tensor,
    predict: Predictor,
    schedule: DdimSchedule,
    start: int = 0,
    fixed_point_iterations: int = 0,
    shift: Tensor | None = None,
) -> Tensor:
    """Go from image latents `(B,C,h,w)` up to level `start`: the noise that `ddim_denoise` turns into them.

    Plain DDIM inversion uses the noise predicted one level too low. Each iteration predicts it again at the level just
    reached, a fixed-point iteration towards the exact inverse of `ddim_denoise` (arXiv 2312.12540). A level without
    signal (zero terminal SNR) holds nothing of the image, so no inversion from there is exact.
    """
    for index in reversed(range(start, len(schedule.timesteps))):
        below = latents if shift is None else latents - shift.to(latents)
        signal = schedule.alphas_cumprod[index + 1]
        for _ in range(fixed_point_iterations + 1):
            epsilon = predict(latents, schedule.timesteps[index]).pred_epsilon
            original = (below - (1 - signal) ** 0.5 * epsilon) / signal**0.5
            latents = add_noise(Prediction(original, epsilon), schedule.alphas_cumprod[index])
    return latents
