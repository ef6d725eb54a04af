"""FlowEdit (arXiv 2412.08629): move from the scan to its answer directly, by what the network predicts for both.

At each level fresh noise is added to the scan, and to the scan plus the edit so far. The edit e moves to where the two
predicted images differ: e' = e + (1 - s'/s) (x₀(u + e | target) - x₀(u | source) - e), with u the noisy scan and
s = √((1-ᾱ)/ᾱ). There is no inversion, and an edit that changes nothing returns the scan by construction.

The network pulls an edited scan towards the average scan of its prompt, so a patient far from that average gets a
different edit. With `feedback` f the network sees f·e in place of e: less of that pull, but also less correction of
artefacts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ld_common.core.config import require
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.schedule import Prediction, add_noise, noise_ratio
from ld_common.editing.base import EditContext, Editor


@dataclass
class FlowEdit(Editor):
    """The state holds the scan, each step's noise, and the image that the network predicts from the scan under it.

    Its shape is `(B,1+2*steps,C,h,w)`.
    """

    name: ClassVar[str] = "flowedit"
    exact: ClassVar[bool] = True

    feedback: float = 1.0
    """Share of the edit so far that the network sees; below 1 keeps more of the patient's own size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.feedback <= 1, f"edit.feedback is {self.feedback}: it must lie from 0 to 1")

    def noise_count(self, context: EditContext) -> int:
        """One a step."""
        return len(context.schedule.timesteps) - context.start

    @torch.no_grad()
    def invert(self, context: EditContext, latents: Tensor, source: Condition, noise: Tensor) -> Tensor:
        """Predict the image from the scan under noise at each level."""
        schedule, predict, originals = context.schedule, context.predictor(source), []
        for row, index in enumerate(range(context.start, len(schedule.timesteps))):
            noisy = add_noise(Prediction(latents, noise[:, row]), schedule.alphas_cumprod[index])
            originals.append(predict(noisy, schedule.timesteps[index]).pred_original_sample)
        return torch.cat([latents[:, None], noise, torch.stack(originals, 1)], 1)

    @torch.no_grad()
    def edit(
        self, context: EditContext, state: Tensor, source: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """The scan plus its edit."""
        schedule, scan, change = context.schedule, state[:, 0], torch.zeros_like(state[:, 0])
        noise, originals = state[:, 1:].chunk(2, 1)
        predict = context.predictor(source, target)
        further = None if shift is None else shift - (0.0 if context.shift is None else context.shift)
        for row, index in enumerate(range(context.start, len(schedule.timesteps))):
            signal, next_signal = schedule.alphas_cumprod[index], schedule.alphas_cumprod[index + 1]
            if target is not None:
                shown = self.feedback * change
                noisy = add_noise(Prediction(scan + shown, noise[:, row]), signal)
                moved = predict(noisy, schedule.timesteps[index]).pred_original_sample - originals[:, row]
                change = change + (1 - noise_ratio(next_signal) / noise_ratio(signal)) * (moved - shown)
            if further is not None:
                change = change + further.to(change) / next_signal**0.5
        return scan + change
