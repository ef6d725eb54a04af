from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ld_common.core.config import require
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.schedule import Prediction, add_noise
from ld_common.editing.base import EditContext, Editor


@dataclass
class DeltaDenoisingScore(Editor):
    """The state holds the scan and each step's noise, `(B,1+steps,C,h,w)`. Per-step drift is not supported."""

    name: ClassVar[str] = "delta_denoising_score"

    step_size: float = 0.1
    """Step of the gradient descent, in latents."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.step_size > 0, f"edit.step_size is {self.step_size}: it must be above 0")

    def noise_count(self, context: EditContext) -> int:
        """One a step."""
        return len(context.schedule.timesteps) - context.start

    def invert(self, context: EditContext, latents: Tensor, source: Condition, noise: Tensor) -> Tensor:
        """Keep the scan and the noise."""
        return torch.cat([latents[:, None], noise], 1)

    @torch.no_grad()
    def edit(
        self, context: EditContext, state: Tensor, source: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """The scan itself without a target, so this editor is exact."""
        scan, noise = state[:, 0], state[:, 1:]
        if target is None:
            return scan
        image, schedule = scan, context.schedule
        towards_target, towards_source = context.predictor(source, target), context.predictor(source)
        for row, index in enumerate(range(context.start, len(schedule.timesteps))):
            signal, timestep = schedule.alphas_cumprod[index], schedule.timesteps[index]
            noisy_image = add_noise(Prediction(image, noise[:, row]), signal)
            noisy_scan = add_noise(Prediction(scan, noise[:, row]), signal)
            gradient = towards_target(noisy_image, timestep).pred_epsilon
            gradient = gradient - towards_source(noisy_scan, timestep).pred_epsilon
            image = image - self.step_size * gradient
        return image
