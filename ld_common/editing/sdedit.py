"""SDEdit (arXiv 2108.01073): add the seed's noise to the scan and denoise under the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.schedule import Prediction, add_noise, ddim_denoise
from ld_common.editing.base import EditContext, Editor


@dataclass
class SdEdit(Editor):
    """The baseline: it redraws whatever the noise covers, so only a scan's coarse features come back."""

    name: ClassVar[str] = "sdedit"

    def noise_count(self, context: EditContext) -> int:
        """One latent of noise for each scan, which `invert` adds to it."""
        return 1

    def invert(self, context: EditContext, latents: Tensor, source: Condition, noise: Tensor) -> Tensor:
        """The scan with noise at level `start`, `(B,C,h,w)`."""
        return add_noise(Prediction(latents, noise[:, 0]), context.schedule.alphas_cumprod[context.start])

    def edit(
        self, context: EditContext, state: Tensor, source: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """Denoise from level `start`."""
        return ddim_denoise(state, context.predictor(source, target), context.schedule, context.start, shift)
