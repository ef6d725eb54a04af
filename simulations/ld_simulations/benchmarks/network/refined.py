"""An editor that lets the network redraw the closed form's answer: tried here, and worse than the closed form alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ld_common.diffusion.conditioning import Condition
from ld_common.editing.base import EditContext
from ld_common.editing.ddpm import EditFriendlyDdpm


@dataclass
class RefinedDrift(EditFriendlyDdpm):
    """The scan's edit-friendly DDPM state (arXiv 2304.06140), shifted by what the longitudinal drift predicts.

    The noisiest level is a·z + s·ε, so a change Δ of z is a·Δ of the level. The maps, which hold what the network does
    not know of the scan, stay.
    """

    name: ClassVar[str] = "refined drift"
    takes_move: ClassVar[bool] = True

    def edit(
        self, context: EditContext, state: Tensor, source: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """The network's steps from the shifted state."""
        if target is not None and target.move is not None:
            signal = float(context.schedule.alphas_cumprod[context.start]) ** 0.5
            state = state.clone()
            state[:, 0] += signal * target.move
        return super().edit(context, state, source, target, shift)
