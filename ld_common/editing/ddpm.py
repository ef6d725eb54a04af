"""Edit-friendly DDPM inversion (arXiv 2304.06140): find the noise of each stochastic step that returns the scan.

Every level of the schedule is drawn from the scan with noise of its own, which determines what the stochastic steps in
between must have added: their noise maps. Denoising with these maps returns the scan by construction, and under the
target keeps what they hold. Another seed gives other levels, and so another answer to the same request.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.schedule import Prediction, add_noise
from ld_common.editing.base import EditContext, Editor


@dataclass
class EditFriendlyDdpm(Editor):
    """The state is the noisiest level and the noise map of each step, `(B,1+steps,C,h,w)`."""

    name: ClassVar[str] = "ddpm"
    exact: ClassVar[bool] = True

    def noise_count(self, context: EditContext) -> int:
        """One a level."""
        return len(context.schedule.timesteps) - context.start

    @torch.no_grad()
    def invert(self, context: EditContext, latents: Tensor, source: Condition, noise: Tensor) -> Tensor:
        """Draw the levels, ask the network at all of them together, and solve for the noise maps between them."""
        signals, start = context.schedule.alphas_cumprod, context.start
        levels = [add_noise(Prediction(latents, noise[:, row]), signals[start + row]) for row in range(noise.shape[1])]
        maps = []
        for row, prediction in enumerate(self._predictions(context, torch.stack(levels, 1), source)):
            below = levels[row + 1] if row + 1 < len(levels) else latents
            mean, deviation = _step(prediction, signals[start + row], signals[start + row + 1])
            mean = mean if context.shift is None else mean + context.shift.to(mean)
            maps.append((below - mean) / deviation)
        return torch.stack([levels[0], *maps], 1)

    def _predictions(self, context: EditContext, levels: Tensor, source: Condition) -> Iterator[Prediction]:
        """The network's prediction at each of the scans' levels `(B,L,C,h,w)`, `batch_size` of them in one call."""
        scans, count = levels.shape[:2]
        timesteps = torch.tensor(context.schedule.timesteps[context.start :]).repeat(scans)
        flat, parts = levels.flatten(0, 1), []
        for rows in torch.arange(scans * count).split(self.batch_size):
            predict = context.predictor(source.rows(rows // count))
            parts.append(predict(flat[rows], timesteps[rows].to(levels.device)))
        originals = torch.cat([part.pred_original_sample for part in parts]).unflatten(0, (scans, count))
        epsilons = torch.cat([part.pred_epsilon for part in parts]).unflatten(0, (scans, count))
        yield from (Prediction(originals[:, row], epsilons[:, row]) for row in range(count))

    @torch.no_grad()
    def edit(
        self, context: EditContext, state: Tensor, source: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """The same steps with the same maps."""
        schedule, predict, latents = context.schedule, context.predictor(source, target), state[:, 0]
        signals = schedule.alphas_cumprod
        for row, index in enumerate(range(context.start, len(schedule.timesteps)), start=1):
            mean, deviation = _step(predict(latents, schedule.timesteps[index]), signals[index], signals[index + 1])
            latents = mean + deviation * state[:, row]
            latents = latents if shift is None else latents + shift.to(latents)
        return latents


def _step(prediction: Prediction, signal: float, next_signal: float) -> tuple[Tensor, float]:
    """Mean and deviation of the next latents in ancestral sampling (arXiv 2010.02502, Eq. 12 and 16 with η = 1).

    A last step that adds no noise has deviation 1: its map holds what the network cannot return.
    """
    variance = (1 - next_signal) / (1 - signal) * (1 - signal / next_signal)
    direction = max(1 - next_signal - variance, 0.0) ** 0.5 * prediction.pred_epsilon
    return next_signal**0.5 * prediction.pred_original_sample + direction, variance**0.5 if variance > 0 else 1.0
