"""Signal level and latent scale of diffusers' schedulers at their timesteps.

The drift is defined on z_t = a z_0 + s ε. DDIM and DPM-Solver++ work on z_t itself, Euler works on z_t / a, and a flow
on z_t / (a + s).
"""

from __future__ import annotations

from typing import Any

from ld_common.diffusion.flow import FLOW, flow_scale


def signal_level(scheduler: Any, index: int) -> float:
    """a = sqrt(ᾱ) at a scheduler's timestep of this index, after `set_timesteps`."""
    from diffusers import DDIMScheduler

    if scheduler.config.get("prediction_type") == FLOW:
        return float(scheduler.signal(scheduler.timesteps[index])) ** 0.5
    if isinstance(scheduler, DDIMScheduler):
        return float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])]) ** 0.5
    return 1 / (float(scheduler.sigmas[index]) ** 2 + 1) ** 0.5


def latent_scale(scheduler: Any, index: int) -> float:
    """The factor between z_t and the scheduler's latents: 1, 1/a for Euler, 1/(a + s) for a flow."""
    from diffusers import EulerDiscreteScheduler

    if scheduler.config.get("prediction_type") == FLOW:
        ends = index == len(scheduler.timesteps)
        return 1.0 if ends else float(flow_scale(scheduler.signal(scheduler.timesteps[index])))
    return 1 / signal_level(scheduler, index) if isinstance(scheduler, EulerDiscreteScheduler) else 1.0
