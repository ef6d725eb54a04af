"""Edit-friendly DDPM inversion (arXiv 2304.06140): the noise of each step that returns the scan, found by drawing.

Every level of the trajectory is drawn from the scan with noise of its own, so that what the stochastic steps between
them must have added, their noise maps, follows. Denoising with these maps returns the scan by construction; under the
target it keeps what they hold. Another seed gives other levels, and so another answer to the same question.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ld_common.diffusion.base_model import Condition
from ld_common.diffusion.schedule import Prediction, mixture
from ld_common.editing.base import Method, Setting


class Ddpm(Method):
    """The state is the noisiest level and the noise map of each step, `(B,1+steps,C,h,w)`."""

    def draws(self, setting: Setting) -> int:
        """One a level."""
        return len(setting.path.timesteps) - setting.start

    @torch.no_grad()
    def abduct(self, setting: Setting, latents: Tensor, factual: Condition, noise: Tensor) -> Tensor:
        """Draw the levels, and find what lies between them."""
        path, predict, maps = setting.path, setting.predictor(factual), []
        drawn = [
            mixture(Prediction(latents, noise[:, row]), path.levels[setting.start + row])
            for row in range(noise.shape[1])
        ]
        above = drawn[0]
        for row, index in enumerate(range(setting.start, len(path.timesteps))):
            below = drawn[row + 1] if row + 1 < len(drawn) else latents
            mean, deviation = _step(predict(above, path.timesteps[index]), path.levels[index], path.levels[index + 1])
            mean = mean if setting.shift is None else mean + setting.shift.to(mean)
            maps.append((below - mean) / deviation)
            above = mean + deviation * maps[-1]  # what denoising will find, rounding included
        return torch.stack([drawn[0], *maps], 1)

    @torch.no_grad()
    def answer(
        self, setting: Setting, state: Tensor, factual: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """The same steps with the same maps."""
        path, predict, latents = setting.path, setting.predictor(factual, target), state[:, 0]
        for row, index in enumerate(range(setting.start, len(path.timesteps)), start=1):
            mean, deviation = _step(predict(latents, path.timesteps[index]), path.levels[index], path.levels[index + 1])
            latents = mean + deviation * state[:, row]
            latents = latents if shift is None else latents + shift.to(latents)
        return latents


def _step(prediction: Prediction, level: float, following: float) -> tuple[Tensor, float]:
    """Mean and deviation of the next latents in ancestral sampling (arXiv 2010.02502, Eq. 12 and 16 with η = 1).

    A last step that adds no noise has deviation 1: its map holds what the network cannot return.
    """
    variance = (1 - following) / (1 - level) * (1 - level / following)
    mean = following**0.5 * prediction.clean + max(1 - following - variance, 0.0) ** 0.5 * prediction.noise
    return mean, variance**0.5 if variance > 0 else 1.0
