"""What a longitudinal drift predicts to change in a scan, calibrated by the patient's earlier visits.

With one scan it is the drift's own change. Earlier visits correct it twice:

    latents     Δ + s · T · slope of what the visits moved beyond the drift's prediction,  s = v / (v + own_slope_half)
    biomarker   the change is scaled until the drawn growth is the mean of the growth drawn so far and of the patient's
                own straight line,  weighted w = v / (v + own_growth_half)

v is the sum of squared distances of the visits' times from their mean, in years²: a visit's noise divided by v is the
variance of a slope, so both weights are those of the best linear prediction for a ratio of a visit's noise to how much
patients differ. `own_slope_half` and `own_growth_half` are that ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import BaseModel
from ld_common.diffusion.longitudinal import AttributeChange, LongitudinalDrift
from ld_common.editing.base import Editor
from ld_common.editing.history import ScanHistory, Write

SCALINGS = 3
"""Times that a change is scaled towards its goal, since growth is not quite proportional to it."""
LEAST_FACTOR, LARGEST_FACTOR = 0.25, 3.0
Biomarker = Callable[[Tensor], Tensor]
"""From pictures `(N,1,S,S)` to areas `(N,)`."""


@dataclass(frozen=True, eq=False)
class Mover:
    """Computes the change of scans' latents that a longitudinal drift predicts."""

    drift: LongitudinalDrift
    editor: Editor
    base: BaseModel | None = None
    """For scans with a history."""
    histories: Mapping[int, ScanHistory] | None = None
    """By the scan's row."""
    pictures: Tensor | None = None
    """Of the scans `(N,1,S,S)`, where there are histories."""
    biomarker: Biomarker | None = None

    def move(self, row: int, latents: Tensor, asked: AttributeChange) -> Tensor:
        """The change of a scan's latents `(C,h,w)` for one edit."""
        history = (self.histories or {}).get(row)
        if history is None or not asked.years:
            return self._predicted(latents, asked)
        categories, years = replace(asked, target=asked.switched, years=0.0), replace(asked, source=asked.switched)
        first = self._predicted(latents, categories)
        return first + self._over_time(row, latents, first, years, history)

    def _predicted(self, latents: Tensor, asked: AttributeChange) -> Tensor:
        return self.drift.change(latents, asked, self.editor.time_scale, self.editor.effect_scale)

    def _over_time(
        self, row: int, latents: Tensor, first: Tensor, asked: AttributeChange, history: ScanHistory
    ) -> Tensor:
        """What the years of an edit change after its categories moved the latents by `first`."""
        if self.base is None or self.pictures is None:
            raise RequestError("a history needs the base's autoencoder and the scans' pictures")
        change = self._predicted(latents + first, asked)
        visits = torch.cat([self.base.encode(history.pictures), latents[None].to(self.base.device, self.base.dtype)])
        share = history.spread / (history.spread + self.editor.own_slope_half)
        beyond = visits.to(latents) - latents - self._paths(latents, asked, history)
        change = change + share * asked.years * history.slope(beyond)
        if self.biomarker is None:
            return change
        areas = self.biomarker(torch.cat([history.pictures, self.pictures[row : row + 1]]))
        growth = GrowthMeter(self.base, self.biomarker, self.pictures[row], history.write)
        weight = history.spread / (history.spread + self.editor.own_growth_half)
        own = asked.years * float(history.slope(areas.double()))
        return _scaled(latents + first, change, own, weight, growth)

    def _paths(self, latents: Tensor, asked: AttributeChange, history: ScanHistory) -> Tensor:
        """Where the drift expects the scan's patient to have been at each visit, relative to the scan."""
        yearly = [(end - start) / asked.years for start, end in zip(asked.switched, asked.target, strict=True)]
        paths = []
        for time in history.times.tolist():
            before = tuple(start + rate * time for start, rate in zip(asked.switched, yearly, strict=True))
            back = AttributeChange(asked.switched, asked.switched, before, time)
            paths.append(self._predicted(latents, back))
        return torch.stack(paths)


@dataclass(frozen=True, eq=False)
class GrowthMeter:
    """Measures how much a change of latents makes the biomarker grow, on what would be written."""

    base: BaseModel
    biomarker: Biomarker
    scan: Tensor
    """The model's picture `(1,S,S)`."""
    write: Write | None

    def __call__(self, latents: Tensor, change: Tensor) -> float:
        """Growth by a change `(C,h,w)` of a scan's latents."""
        before, after = self.base.decode(torch.stack([latents, latents + change]))
        if self.write is not None:
            before, after = self.scan, self.write(before, after)
        areas = self.biomarker(torch.stack([before, after])).tolist()
        return float(areas[1] - areas[0])


def _scaled(latents: Tensor, change: Tensor, own_growth: float, weight: float, growth: GrowthMeter) -> Tensor:
    """The change times the factor by which the drawn growth reaches its goal."""
    drawn = growth(latents, change)
    goal, factor = weight * own_growth + (1 - weight) * drawn, 1.0
    for _ in range(SCALINGS):
        # no scaling reaches a goal of the other sign, and a structure that is not seen has no area
        if not math.isfinite(goal) or not drawn * goal > 0:
            break
        factor = min(max(factor * goal / drawn, LEAST_FACTOR), LARGEST_FACTOR)
        drawn = growth(latents, factor * change)
    return factor * change
