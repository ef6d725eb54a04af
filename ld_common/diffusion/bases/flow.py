"""The scheduler of flow-matching bases, as the rest of this project takes one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ld_common.core.errors import ModelError
from ld_common.diffusion.flow import FLOW, flow_signal

Spacing = Callable[[FlowMatchEulerDiscreteScheduler, int], None]
"""Sets a scheduler's timesteps for a number of steps as the base's own pipeline does."""
NOT_TAKEN = ("invert_sigmas", "stochastic_sampling")
"""Settings by which a step is not that of the flow from noise to image."""


class FlowSchedule:
    """diffusers' `FlowMatchEulerDiscreteScheduler` with the spacing of the base's pipeline.

    Timesteps count from 0 as those of schedules of β do: σ = (timestep + 1) / T. They need not be whole.
    """

    init_noise_sigma = 1.0

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler, spacing: Spacing) -> None:
        self._scheduler, self._spacing = scheduler, spacing
        self._count = int(scheduler.config["num_train_timesteps"])
        self.config: Mapping[str, Any] = {**scheduler.config, "prediction_type": FLOW}
        self.alphas_cumprod = self.signal(torch.arange(self._count, dtype=torch.float64))
        """ᾱ at whole timesteps, `(T,)`, from which training draws; the last is 0. In float64, as 1 - ᾱ is small."""
        self.timesteps = torch.empty(0)
        """Of `set_timesteps`, noisiest first."""
        self.num_inference_steps = 0

    def signal(self, timesteps: Tensor) -> Tensor:
        """ᾱ at timesteps of any shape."""
        signal: Tensor = flow_signal((timesteps + 1) / self._count)
        return signal

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Choose the timesteps of a number of steps."""
        self._spacing(self._scheduler, num_inference_steps)
        self.timesteps = self._scheduler.timesteps - 1
        self.num_inference_steps = num_inference_steps

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The latents of the flow are what the network takes."""
        return latents

    def step(self, output: Tensor, timestep: Tensor, latents: Tensor) -> Any:
        """Euler's step of the flow; `prev_sample` of what is returned are the next latents."""
        return self._scheduler.step(output, timestep + 1, latents)


def read_flow_schedule(folder: Path, name: str, spacing: Spacing) -> FlowSchedule:
    """The schedule of a base's folder.

    Raises:
        ModelError: a setting that turns the flow round or makes its steps random.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    for key in NOT_TAKEN:
        if scheduler.config.get(key):
            raise ModelError(f"the scheduler of base model '{name}' has {key}: bases of plain rectified flow load")
    return FlowSchedule(scheduler, spacing)
