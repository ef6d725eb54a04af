"""Deterministic diffusion (DDIM, arXiv 2010.02502): sampling and inversion along one schedule.

A latent at level i has signal `alphas_cumprod[i]` = ᾱ. Level 0 is the noisiest, the last one is the image's. Sampling
goes down the levels; inversion goes up and finds the noise from which an image is sampled.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ld_common.core.errors import ConfigError, ModelError
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.drift import LatentDrift, shift_output
from ld_common.diffusion.flow import FLOW, flow_prediction, flow_scale

if TYPE_CHECKING:
    from diffusers import DDIMScheduler
    from typing_extensions import TypeIs

    from ld_common.diffusion.bases.flow import FlowSchedule


@dataclass(frozen=True, eq=False)
class Prediction:
    """The network's estimate of the image and the noise in latents `(B,C,h,w)` at a timestep."""

    pred_original_sample: Tensor
    pred_epsilon: Tensor


Predictor = Callable[[Tensor, float | Tensor], Prediction]
"""Of latents `(B,C,h,w)` at one timestep, or at one each `(B,)`."""


@dataclass(frozen=True)
class DdimSchedule:
    """The timesteps of a sampler, noisiest first, and ᾱ at each and at the end: `len(timesteps) + 1` levels."""

    timesteps: list[float]
    """Whole numbers but for flows."""
    alphas_cumprod: list[float]


def is_flow(scheduler: DDIMScheduler | FlowSchedule) -> TypeIs[FlowSchedule]:
    """Whether a base's schedule is that of a rectified flow."""
    return bool(scheduler.config["prediction_type"] == FLOW)


def ddim_schedule(scheduler: DDIMScheduler | FlowSchedule, steps: int) -> DdimSchedule:
    """The scheduler's timesteps, spacing and final level for a number of steps.

    Raises:
        ConfigError: more steps than the base's schedule has timesteps.
    """
    sampler = copy.deepcopy(scheduler)
    check_steps(scheduler, steps)
    sampler.set_timesteps(steps)
    if is_flow(sampler):
        levels = sampler.signal(sampler.timesteps.double()).clamp(0, 1)  # the first is 0 but for rounding
        return DdimSchedule(sampler.timesteps.tolist(), [*levels.tolist(), 1.0])
    timesteps: list[float] = [int(timestep) for timestep in sampler.timesteps]
    signals = [float(sampler.alphas_cumprod[timestep]) for timestep in timesteps]
    return DdimSchedule(timesteps, [*signals, float(sampler.final_alpha_cumprod)])


def check_steps(scheduler: DDIMScheduler | FlowSchedule, steps: int) -> None:
    """Raise `ConfigError` for more steps than the base's schedule has timesteps."""
    most = len(scheduler.alphas_cumprod) - 1 - int(scheduler.config.get("steps_offset", 0))
    if not 0 < steps <= most:
        raise ConfigError(f"steps is {steps}: this base allows 1 to {most}")


def predictor(model: Denoiser, condition: Condition, drift: LatentDrift | None = None) -> Predictor:
    """The network under a condition and drift, for every prediction type."""
    kind, levels = model.scheduler.config["prediction_type"], model.scheduler.alphas_cumprod

    def predict(latents: Tensor, timestep: float | Tensor) -> Prediction:
        signal = _signal(model.scheduler, timestep, latents)
        taken = latents * flow_scale(signal) if kind == FLOW else latents
        output = model.unet(condition.network_input(taken), timestep, condition.context).sample
        output = shift_output(output, drift, kind, signal**0.5, levels)
        if kind == "epsilon":
            return Prediction((latents - (1 - signal) ** 0.5 * output) / signal**0.5, output)
        if kind == "v_prediction":
            clean = signal**0.5 * latents - (1 - signal) ** 0.5 * output
            return Prediction(clean, signal**0.5 * output + (1 - signal) ** 0.5 * latents)
        if kind == "sample":
            return Prediction(output, (latents - signal**0.5 * output) / (1 - signal) ** 0.5)
        if kind == FLOW:
            return Prediction(*flow_prediction(latents, output, signal))
        raise ModelError(f"prediction type '{kind}' is unknown: known: epsilon, v_prediction, sample")

    return predict


def _signal(scheduler: DDIMScheduler | FlowSchedule, timestep: float | Tensor, latents: Tensor) -> Any:
    """ᾱ at one timestep, or at one each, `(B,1,1,1)`."""
    steps = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep)
    signal = scheduler.signal(steps.double()).clamp(0, 1) if is_flow(scheduler) else scheduler.alphas_cumprod[steps]
    return signal.view(-1, 1, 1, 1).to(latents) if isinstance(timestep, Tensor) else float(signal)


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
