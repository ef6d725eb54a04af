"""The longitudinal drift in closed form: the scan's latents move as regression over the sites' visits predicts.

No network is asked: an answer takes a fraction of a second, does not depend on the seed, and the null edit returns the
scan's latents exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ld_common.diffusion.conditioning import Condition
from ld_common.editing.base import EditContext, Editor


@dataclass
class DriftEditor(Editor):
    """The state is the scan's latents."""

    name: ClassVar[str] = "drift"
    exact: ClassVar[bool] = True
    needs_longitudinal: ClassVar[bool] = True
    takes_move: ClassVar[bool] = True
    unused: ClassVar[tuple[str, ...]] = (
        "num_inference_steps",
        "noise_fraction",
        "guidance_interval",
        "guidance_outside",
        "delta",
    )

    guidance_scale: float = 1.0
    """Factor of the whole change."""

    def invert(self, context: EditContext, latents: Tensor, source: Condition, noise: Tensor) -> Tensor:
        """The latents themselves."""
        return latents

    def edit(
        self, context: EditContext, state: Tensor, source: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """The latents plus what the drift predicts to change."""
        move = None if target is None else target.move
        return state if move is None else state + self.guidance_scale * move
