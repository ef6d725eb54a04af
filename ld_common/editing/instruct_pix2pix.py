"""InstructPix2Pix (arXiv 2211.09800): drawn anew from the seed's noise by a network that sees the scan beside it."""

from __future__ import annotations

from torch import Tensor

from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import Condition
from ld_common.diffusion.drift import prior_shift
from ld_common.diffusion.schedule import denoise
from ld_common.editing.base import Method, Setting


class Instruct(Method):
    """The state is noise, around the drift's prior; of the scan the answer knows what the network sees."""

    def draws(self, setting: Setting) -> int:
        """One."""
        return 1

    def abduct(self, setting: Setting, latents: Tensor, factual: Condition, noise: Tensor) -> Tensor:
        """Where sampling starts, `(B,C,h,w)`; raises `ConfigError` where the network sees no scan."""
        if not setting.model.sees_baseline:
            raise ConfigError("method instruct needs a network that sees the scan, of scheme instruct: take another")
        shift = prior_shift(setting.drift, setting.path.levels[0] ** 0.5, setting.model.scheduler.alphas_cumprod)
        return noise[:, 0] if shift is None else noise[:, 0] + shift.to(noise)

    def answer(
        self, setting: Setting, state: Tensor, factual: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """Denoised from there, over the whole trajectory."""
        return denoise(state, setting.predictor(factual, target), setting.path, 0, shift)
