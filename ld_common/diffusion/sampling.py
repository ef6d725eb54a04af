"""Sampling from noise with diffusers' schedulers, started where the drift says.

The drift is defined on z_t = a z_0 + s ε. Euler's scheduler works on z_t / a and a flow's on z_t / (a + s), so shifts
are scaled for them. One drift gives the same distribution with every sampler, number of steps and spacing.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.drift import LatentDrift, prior_shift, restore, shift_output, step_shift
from ld_common.diffusion.schedule import check_steps, is_flow
from ld_common.diffusion.signal_level import latent_scale, signal_level

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

    from ld_common.diffusion.bases.flow import FlowSchedule

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
"""Class in diffusers, by name."""
FLOW_SAMPLERS = ("ddim", "euler")
"""Both are Euler's steps of the flow."""
SPACINGS = ("leading", "trailing", "linspace")


def make_sampler(
    scheduler: DDIMScheduler | FlowSchedule, name: str = "ddim", steps: int = 50, spacing: str = ""
) -> Any:
    """A diffusers scheduler on the base's noise schedule, with its timesteps set.

    Args:
        scheduler: the base's.
        name: `ddim`, `dpm-solver++` or `euler`.
        steps: number of network evaluations.
        spacing: `leading`, `trailing` or `linspace`; empty for the base's.

    Raises:
        ConfigError: an unknown name or spacing, `linspace` for `ddim`, more steps than the schedule has room for, or,
            for a flow, another sampler than `ddim` or `euler`, which are the same there, or a spacing.
    """
    import diffusers

    if name not in SAMPLERS:
        raise ConfigError(f"sampler is '{name}': known: {', '.join(SAMPLERS)}")
    if spacing and spacing not in SPACINGS:
        raise ConfigError(f"spacing is '{spacing}': known: {', '.join(SPACINGS)}")
    if (name, spacing) == ("ddim", "linspace"):
        # diffusers' DDIM goes T/N timesteps down at each step, also where linspace has another next timestep
        raise ConfigError("spacing is 'linspace': ddim takes steps of equal length, use leading or trailing")
    check_steps(scheduler, steps)
    if is_flow(scheduler):
        return _flow_sampler(scheduler, name, steps, spacing)
    options = {"timestep_spacing": spacing} if spacing else {}
    sampler = getattr(diffusers, SAMPLERS[name]).from_config(scheduler.config, **options)
    sampler.set_timesteps(steps)
    return sampler


def _flow_sampler(scheduler: FlowSchedule, name: str, steps: int, spacing: str) -> FlowSchedule:
    if name not in FLOW_SAMPLERS:
        raise ConfigError(f"sampler is '{name}': this base is a flow, which takes {' or '.join(FLOW_SAMPLERS)}")
    if spacing:
        raise ConfigError(f"spacing is '{spacing}': this base is a flow, whose own pipeline sets its timesteps")
    sampler = copy.deepcopy(scheduler)
    sampler.set_timesteps(steps)
    return sampler


@torch.no_grad()
def sample(
    model: Denoiser,
    context: Tensor,
    noise: Tensor,
    sampler: Any,
    drift: LatentDrift | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Draw latents `(N,C,h,w)`.

    Args:
        model: the denoiser.
        context: prompt embeddings `(N,T,D)`.
        noise: `(N,C,h,w)` from N(0, I).
        sampler: from `make_sampler`.
        drift: None is plain diffusion, bit for bit; a drift of batched μ has one μ per image.
        batch_size: images denoised together.
    """
    parts = []
    for first in range(0, len(noise), batch_size):
        rows = slice(first, first + batch_size)
        embeddings, start_noise = (part[rows].to(model.device, model.dtype) for part in (context, noise))
        parts.append(_sample(model, embeddings, start_noise, sampler, None if drift is None else drift.rows(rows)))
    return torch.cat(parts)


def _sample(model: Denoiser, context: Tensor, noise: Tensor, sampler: Any, drift: LatentDrift | None) -> Tensor:
    sampler.set_timesteps(sampler.num_inference_steps)
    levels, kind = model.scheduler.alphas_cumprod, model.scheduler.config["prediction_type"]
    latents = noise * sampler.init_noise_sigma
    shift = prior_shift(drift, signal_level(sampler, 0), levels)
    if shift is not None:
        latents = latents + (latent_scale(sampler, 0) * shift).to(latents)
    added = step_shift(drift, len(sampler.timesteps), levels)
    for index, timestep in enumerate(sampler.timesteps):
        output = model.unet(sampler.scale_model_input(latents, timestep), timestep, context).sample
        output = shift_output(output, drift, kind, signal_level(sampler, index), levels)
        latents = sampler.step(output, timestep, latents).prev_sample
        if added is not None:
            latents = latents + (latent_scale(sampler, index + 1) * added).to(latents)
    return restore(latents, drift)
