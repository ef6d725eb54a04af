"""Pictures from noise: a diffusers scheduler, started where the drift says.

The drift is defined on z_t = a z_0 + s ε. Euler's scheduler works on z_t / a instead; everything is scaled for it here,
so that one drift draws the same distribution whatever the sampler, the number of steps and their spacing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.drift import LatentDrift, prior_shift, restore, shift_output, step_shift
from ld_common.diffusion.schedule import check_steps

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
"""Class of diffusers by name."""
SPACINGS = ("leading", "trailing", "linspace")


def make_sampler(scheduler: DDIMScheduler, name: str = "ddim", steps: int = 50, spacing: str = "") -> Any:
    """A sampler on the base's noise schedule with its timesteps set.

    Args:
        scheduler: the base's own.
        name: `ddim`, `dpm-solver++` or `euler`.
        steps: number of network evaluations.
        spacing: `leading`, `trailing` or `linspace`; empty for the base's own.

    Raises:
        ConfigError: an unknown name or spacing, `linspace` for `ddim`, or more steps than the schedule has room for.
    """
    import diffusers

    if name not in SAMPLERS:
        raise ConfigError(f"sampler is '{name}': known: {', '.join(SAMPLERS)}")
    if spacing and spacing not in SPACINGS:
        raise ConfigError(f"spacing is '{spacing}': known: {', '.join(SPACINGS)}")
    if (name, spacing) == ("ddim", "linspace"):
        # diffusers' DDIM goes T/N timesteps down at each step, whatever the next one of a linspace is
        raise ConfigError("spacing linspace does not fit ddim, whose steps are equally long: use leading or trailing")
    check_steps(scheduler, steps)
    own = {"timestep_spacing": spacing} if spacing else {}
    sampler = getattr(diffusers, SAMPLERS[name]).from_config(scheduler.config, **own)
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
        noise: `(N,C,h,w)` from N(0, I); the same noise draws the same patient under another drift.
        sampler: from `make_sampler`.
        drift: None is plain diffusion, bit for bit.
        batch_size: pictures drawn together.
    """
    parts = []
    for start in range(0, len(noise), batch_size):
        rows = slice(start, start + batch_size)
        own, some = (part[rows].to(model.device, model.dtype) for part in (context, noise))
        parts.append(_sample(model, own, some, sampler, None if drift is None else drift.rows(rows)))
    return torch.cat(parts)


def _sample(model: Denoiser, context: Tensor, noise: Tensor, sampler: Any, drift: LatentDrift | None) -> Tensor:
    sampler.set_timesteps(sampler.num_inference_steps)
    levels, kind = model.scheduler.alphas_cumprod, model.scheduler.config["prediction_type"]
    latents = noise * sampler.init_noise_sigma
    shift = prior_shift(drift, _signal_level(sampler, 0), levels)
    if shift is not None:
        latents = latents + (_scale(sampler, 0) * shift).to(latents)
    added = step_shift(drift, len(sampler.timesteps), levels)
    for index, timestep in enumerate(sampler.timesteps):
        output = model.unet(sampler.scale_model_input(latents, timestep), timestep, context).sample
        output = shift_output(output, drift, kind, _signal_level(sampler, index), levels)
        latents = sampler.step(output, timestep, latents).prev_sample
        if added is not None:
            latents = latents + (_scale(sampler, index + 1) * added).to(latents)
    return restore(latents, drift)


def _signal_level(sampler: Any, index: int) -> float:
    """a = sqrt(ᾱ) at a sampler's timestep."""
    from diffusers import DDIMScheduler

    if isinstance(sampler, DDIMScheduler):
        return float(sampler.alphas_cumprod[int(sampler.timesteps[index])]) ** 0.5
    return 1 / (float(sampler.sigmas[index]) ** 2 + 1) ** 0.5


def _scale(sampler: Any, index: int) -> float:
    """What a sampler's latents are of z: 1, or 1/a for Euler's."""
    from diffusers import EulerDiscreteScheduler

    return 1 / _signal_level(sampler, index) if isinstance(sampler, EulerDiscreteScheduler) else 1.0
