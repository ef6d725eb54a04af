"""BELM (arXiv 2410.07273), an inversion that is exact by algebra: a step from two levels to the next can be undone.

With u = z/√ᾱ and s = √((1-ᾱ)/ᾱ), and h_i = s_i - s_{i+1} the length of the step from level i to i+1, its optimal
form of second order (O-BELM) is u_{i+1} = r² u_{i-1} + (1 - r²) u_i - h_i (1 + r) ε(z_i) with r = h_i / h_{i-1}. The
network is asked at the level in the middle both ways, so the way back asks just what the way there asked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import Condition
from ld_common.diffusion.schedule import Trajectory, noise_ratio
from ld_common.editing.base import Method, Setting


class Belm(Method):
    """The state is the scan at two neighbouring levels, `(B,2,C,h,w)`, float64: a null edit returns it by algebra."""

    @torch.no_grad()
    def abduct(self, setting: Setting, latents: Tensor, factual: Condition, noise: Tensor) -> Tensor:
        """The scan's u at levels `start` and `start + 1`, `(B,2,C,h,w)`."""
        steps, start, predict = _Steps(setting.path), _start(setting), setting.predictor(factual)
        last = len(setting.path.timesteps)
        lower = latents.double() / steps.signal[last]  # u at level i + 1
        shown = lower if setting.shift is None else lower - setting.shift.double() / steps.signal[last]
        upper = shown
        for _ in range(setting.refinements + 1):
            found = predict((upper * steps.signal[last - 1]).to(latents), setting.path.timesteps[-1]).noise
            upper = shown + steps.length(last - 1) * found.double()
        for level in range(last - 1, start, -1):
            found = predict((upper * steps.signal[level]).to(latents), setting.path.timesteps[level]).noise.double()
            ratio = steps.ratio(level)
            below = lower if setting.shift is None else lower - setting.shift.double() / steps.signal[level + 1]
            above = (below - (1 - ratio**2) * upper + steps.length(level) * (1 + ratio) * found) / ratio**2
            lower, upper = upper, above
        return torch.stack([upper, lower], 1)

    @torch.no_grad()
    def answer(
        self, setting: Setting, state: Tensor, factual: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """The same steps down again; the first of them, which both levels hold, is the scan's."""
        steps, start, predict = _Steps(setting.path), _start(setting), setting.predictor(factual, target)
        upper, lower = state[:, 0], state[:, 1]
        for level in range(start + 1, len(setting.path.timesteps)):
            inner = (lower * steps.signal[level]).to(factual.context)
            found, ratio = predict(inner, setting.path.timesteps[level]).noise.double(), steps.ratio(level)
            below = ratio**2 * upper + (1 - ratio**2) * lower - steps.length(level) * (1 + ratio) * found
            upper, lower = lower, below if shift is None else below + shift.double() / steps.signal[level + 1]
        return (lower * steps.signal[len(setting.path.timesteps)]).to(factual.context)


class _Steps:
    """√ᾱ, s and h of a trajectory's levels."""

    def __init__(self, path: Trajectory) -> None:
        self.signal = [level**0.5 for level in path.levels]
        self._noise = [noise_ratio(level) for level in path.levels]

    def length(self, level: int) -> float:
        """h of the step from a level to the next."""
        return self._noise[level] - self._noise[level + 1]

    def ratio(self, level: int) -> float:
        """Of that step to the one before."""
        return self.length(level) / self.length(level - 1)


def _start(setting: Setting) -> int:
    """The first level that two-level steps can reach: with signal in it, and two steps above the image.

    Raises:
        ConfigError: the trajectory is too short.
    """
    levels = setting.path.levels
    start = min(max(setting.start, 1 if levels[0] == 0 else 0), len(levels) - 3)
    if start < 0 or levels[start] == 0:
        raise ConfigError("method belm takes two levels at a time: give more steps")
    return start
