"""InstructPix2Pix (arXiv 2211.09800): draw anew from the seed's noise with a network that takes the scan as input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ld_common.core.errors import ConfigError
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.drift import prior_shift
from ld_common.diffusion.schedule import ddim_denoise
from ld_common.editing.base import EditContext, Editor


@dataclass
class InstructPix2PixEditor(Editor):
    """The state is noise around the drift's prior; the answer depends on the scan only through the network's input."""

    name: ClassVar[str] = "instruct_pix2pix"

    def noise_count(self, context: EditContext) -> int:
        """One latent of noise for each scan, from which sampling starts."""
        return 1

    def invert(self, context: EditContext, latents: Tensor, source: Condition, noise: Tensor) -> Tensor:
        """Start of sampling, `(B,C,h,w)`; raises `ConfigError` if the network takes no scan."""
        model, schedule = context.model, context.schedule
        if not model.image_conditioned:
            raise ConfigError("editor instruct_pix2pix needs a release of adapter instruct_pix2pix: use another editor")
        signal = schedule.alphas_cumprod[0] ** 0.5
        shift = prior_shift(context.drift, signal, model.scheduler.alphas_cumprod)
        return noise[:, 0] if shift is None else noise[:, 0] + shift.to(noise)

    def edit(
        self, context: EditContext, state: Tensor, source: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """Denoise over the whole schedule."""
        return ddim_denoise(state, context.predictor(source, target), context.schedule, 0, shift)
