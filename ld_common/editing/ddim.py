"""DDIM inversion, then denoising under the target (arXiv 2010.02502; as abduction: Diff-SCM, arXiv 2202.10166)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ld_common.core.config import require
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.schedule import ddim_denoise, ddim_invert
from ld_common.editing.base import EditContext, Editor


@dataclass
class DdimInversion(Editor):
    """The state is the scan's own noise. More fixed-point iterations return the scan more exactly."""

    name: ClassVar[str] = "ddim"

    fixed_point_iterations: int = 1
    """Fixed-point iterations of each inversion step (arXiv 2312.12540)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.fixed_point_iterations >= 0,
            f"edit.fixed_point_iterations is {self.fixed_point_iterations}: it must not be negative",
        )

    def invert(self, context: EditContext, latents: Tensor, source: Condition, noise: Tensor) -> Tensor:
        """The latents at level `start`, `(B,C,h,w)`."""
        iterations, predict = self.fixed_point_iterations, context.predictor(source)
        return ddim_invert(latents, predict, context.schedule, context.start, iterations, context.shift)

    def edit(
        self, context: EditContext, state: Tensor, source: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """Denoise from level `start`."""
        return ddim_denoise(state, context.predictor(source, target), context.schedule, context.start, shift)
