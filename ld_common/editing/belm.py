"""BELM (arXiv 2410.07273), an inversion that is exact by algebra: each step from two levels to the next can be undone.

With u = z/√ᾱ and s = √((1-ᾱ)/ᾱ), and h_i = s_i - s_{i+1} the length of the step from level i to i+1, its optimal
form of second order (O-BELM) is u_{i+1} = r² u_{i-1} + (1 - r²) u_i - h_i (1 + r) ε(z_i) with r = h_i / h_{i-1}. Both
directions evaluate the network at the middle level, so sampling undoes inversion exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ld_common.core.errors import ConfigError
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.schedule import DdimSchedule, noise_ratio
from ld_common.editing.base import EditContext
from ld_common.editing.ddim import DdimInversion


@dataclass
class Belm(DdimInversion):
    """The state is the scan at two neighbouring levels, `(B,2,C,h,w)`, float64: a null edit returns it by algebra."""

    name: ClassVar[str] = "belm"
    exact: ClassVar[bool] = True

    @torch.no_grad()
    def invert(self, context: EditContext, latents: Tensor, source: Condition, noise: Tensor) -> Tensor:
        """The scan's u at levels `start` and `start + 1`, `(B,2,C,h,w)`."""
        schedule = context.schedule
        steps, start, predict = _Steps(schedule), _start(context), context.predictor(source)
        last = len(schedule.timesteps)
        lower = latents.double() / steps.signal[last]  # u at level i + 1
        unshifted = lower if context.shift is None else lower - context.shift.double() / steps.signal[last]
        upper = unshifted
        for _ in range(self.fixed_point_iterations + 1):
            epsilon = predict((upper * steps.signal[last - 1]).to(latents), schedule.timesteps[-1]).pred_epsilon
            upper = unshifted + steps.length(last - 1) * epsilon.double()
        for level in range(last - 1, start, -1):
            inner = (upper * steps.signal[level]).to(latents)
            epsilon = predict(inner, schedule.timesteps[level]).pred_epsilon.double()
            ratio = steps.ratio(level)
            below = lower if context.shift is None else lower - context.shift.double() / steps.signal[level + 1]
            above = (below - (1 - ratio**2) * upper + steps.length(level) * (1 + ratio) * epsilon) / ratio**2
            lower, upper = upper, above
        return torch.stack([upper, lower], 1)

    @torch.no_grad()
    def edit(
        self, context: EditContext, state: Tensor, source: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """The same steps down again; the state holds the scan at both levels of the first."""
        schedule = context.schedule
        steps, start, predict = _Steps(schedule), _start(context), context.predictor(source, target)
        upper, lower = state[:, 0], state[:, 1]
        for level in range(start + 1, len(schedule.timesteps)):
            inner = (lower * steps.signal[level]).to(source.context)
            epsilon, ratio = predict(inner, schedule.timesteps[level]).pred_epsilon.double(), steps.ratio(level)
            below = ratio**2 * upper + (1 - ratio**2) * lower - steps.length(level) * (1 + ratio) * epsilon
            upper, lower = lower, below if shift is None else below + shift.double() / steps.signal[level + 1]
        return (lower * steps.signal[len(schedule.timesteps)]).to(source.context)


class _Steps:
    """√ᾱ, s and h of a schedule's levels."""

    def __init__(self, schedule: DdimSchedule) -> None:
        self.signal = [level**0.5 for level in schedule.alphas_cumprod]
        self._noise = [noise_ratio(level) for level in schedule.alphas_cumprod]

    def length(self, level: int) -> float:
        """h of the step from a level to the next."""
        return self._noise[level] - self._noise[level + 1]

    def ratio(self, level: int) -> float:
        """Length of that step over the length of the step before."""
        return self.length(level) / self.length(level - 1)


def _start(context: EditContext) -> int:
    """The first level that two-level steps can reach: one with signal, and two steps above the image.

    Raises:
        ConfigError: the schedule is too short.
    """
    levels = context.schedule.alphas_cumprod
    start = min(max(context.start, 1 if levels[0] == 0 else 0), len(levels) - 3)
    if start < 0 or levels[start] == 0:
        raise ConfigError("editor belm takes two levels at a time: raise num_inference_steps")
    return start
