"""DDIM inversion, then denoising under the target (arXiv 2010.02502; as abduction Diff-SCM, arXiv 2202.10166)."""

from __future__ import annotations

from torch import Tensor

from ld_common.diffusion.base_model import Condition
from ld_common.diffusion.schedule import denoise, invert
from ld_common.editing.base import Method, Setting


class Invert(Method):
    """The state is the scan's own noise; it comes back as nearly as the refinements find it."""

    def abduct(self, setting: Setting, latents: Tensor, factual: Condition, noise: Tensor) -> Tensor:
        """The latents at level `start`, `(B,C,h,w)`."""
        predict = setting.predictor(factual)
        return invert(latents, predict, setting.path, setting.start, setting.refinements, setting.shift)

    def answer(
        self, setting: Setting, state: Tensor, factual: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """Denoised from there."""
        return denoise(state, setting.predictor(factual, target), setting.path, setting.start, shift)
