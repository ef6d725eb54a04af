"""SDEdit (arXiv 2108.01073): noise of the seed's is added to the scan, and taken away under the target."""

from __future__ import annotations

from torch import Tensor

from ld_common.diffusion.base_model import Condition
from ld_common.diffusion.schedule import Prediction, denoise, mixture
from ld_common.editing.base import Method, Setting


class SdEdit(Method):
    """The baseline: what the noise covers is drawn anew, so a scan comes back only in its coarse features."""

    def draws(self, setting: Setting) -> int:
        """One."""
        return 1

    def abduct(self, setting: Setting, latents: Tensor, factual: Condition, noise: Tensor) -> Tensor:
        """The scan under noise at level `start`, `(B,C,h,w)`."""
        return mixture(Prediction(latents, noise[:, 0]), setting.path.levels[setting.start])

    def answer(
        self, setting: Setting, state: Tensor, factual: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """Denoised from there."""
        return denoise(state, setting.predictor(factual, target), setting.path, setting.start, shift)
