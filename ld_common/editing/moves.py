"""What a longitudinal drift predicts to change in a scan, calibrated by the patient's earlier visits.

The drift predicts a change of latents, Δ, and by the scan's own edge how much the structure grows (`edge_growth`), with
the years and with categories that act like years. Each of these changes is scaled by itself. Earlier visits correct the
change with the years:

    latents     Δ + s · T · slope of what the visits moved beyond the drift's prediction,  s = v / (v + own_slope_half)
    biomarker   the change is scaled until the drawn growth is w times that of the patient's own straight line, plus
                1 - w times the edge's,  w = v / (v + own_growth_half); of a volume's slices all by one factor

v is the sum of squared distances of the visits' times from their mean, in years²: a visit's noise divided by v is the
variance of a slope, so both weights are those of the best linear prediction for a ratio of a visit's noise to how much
patients differ. `own_slope_half` and `own_growth_half` are that ratio.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import BaseModel
from ld_common.diffusion.longitudinal import AttributeChange, LongitudinalDrift
from ld_common.editing.base import Editor
from ld_common.editing.history import ScanHistory, Write
from ld_common.metrics.structure import Measure

SCALINGS = 3
"""Times that a change is scaled towards its goal, by the secant, since growth is not quite proportional
to it; the nearest counts, since a measured area jumps by pixels."""
CLOSE = 0.02
"""Distance from the goal, as a share of it, at which no further scaling is tried."""
LEAST_FACTOR, LARGEST_FACTOR = 0.25, 3.0
LIKE_YEARS_SHARE = 0.5
"""Of `edge_share`, where a category acts like years: how many it is, is itself an estimate. Chosen on tuning patients
with four draws of training patients."""


@dataclass(frozen=True, eq=False)
class Mover:
    """Computes the change of scans' latents that a longitudinal drift predicts."""

    drift: LongitudinalDrift
    editor: Editor
    base: BaseModel | None = None
    """Where there are histories."""
    histories: Mapping[int, ScanHistory] | None = None
    """By the scan's row; the change of other scans is not scaled."""
    pictures: Tensor | None = None
    """Of the scans `(N,1,S,S)`, where there are histories."""
    area: Measure | None = None
    edge: Measure | None = None
    """Of the structure that is measured."""
    volume: Tensor | None = None
    """Latents `(N,C,h,w)` of the scans, where they are slices of one volume. The biomarker is then summed over them,
    and one factor scales the change of all, so that it does not jump from slice to slice."""
    _volume_factors: dict[AttributeChange, list[float]] = field(default_factory=dict, init=False, repr=False)

    def move(self, row: int, latents: Tensor, asked: AttributeChange) -> Tensor:
        """The change of a scan's latents `(C,h,w)` for one edit."""
        history = (self.histories or {}).get(row)
        if history is None or not (self._edge_share or (asked.years and history.years)):
            return self._predicted(latents, asked)
        if self.volume is None:
            factors = self._factors({row: latents}, asked)
        else:
            factors = self._volume_factors.get(asked) or self._factors(dict(enumerate(self.volume)), asked)
            self._volume_factors[asked] = factors
        moved = latents
        for step, factor in zip(self.drift.steps(asked), factors, strict=True):
            moved = moved + factor * self._change(moved, step, history)
        return moved - latents

    def _predicted(self, latents: Tensor, asked: AttributeChange) -> Tensor:
        return self.drift.change(latents, asked, self.editor.time_scale, self.editor.effect_scale)

    @property
    def _edge_share(self) -> float:
        """Share of the edge's growth in the goal of a scan without a history; the rest is what is drawn anyway."""
        return self.editor.edge_share if self.drift.tells_growth and self.edge is not None else 0.0

    def _factors(self, scans: Mapping[int, Tensor], asked: AttributeChange) -> list[float]:
        """By how much each step of an edit is scaled, for one scan or for all slices of a volume, by their rows."""
        found, states = [], dict(scans)
        for step in self.drift.steps(asked):
            growths, weight, changes = [], 0.0, {}
            for row, latents in states.items():
                history = (self.histories or {}).get(row)
                if history is None:
                    continue
                changes[row] = self._change(latents, step, history)
                if self.area is not None and self.drift.elapsed(step):
                    growths.append(self._growth(row, latents, changes[row], step, history))
                    # the same for all slices
                    weight = history.spread / (history.spread + self.editor.own_growth_half) if step.years else 0.0
            share = self._edge_share * (1.0 if step.years else LIKE_YEARS_SHARE)
            found.append(_factor(growths, weight, share) if growths else 1.0)
            states = {row: states[row] + found[-1] * change for row, change in changes.items()}
        return found

    def _change(self, latents: Tensor, step: AttributeChange, history: ScanHistory) -> Tensor:
        """What one step of an edit changes, before it is scaled."""
        if self.base is None or self.pictures is None:
            raise RequestError("a history needs the base's autoencoder and the scans' pictures")
        change = self._predicted(latents, step)
        if not (history.years and step.years):
            return change
        visits = torch.cat([self.base.encode(history.pictures), latents[None].to(self.base.device, self.base.dtype)])
        share = history.spread / (history.spread + self.editor.own_slope_half)
        beyond = visits.to(latents) - latents - self._paths(latents, step, history)
        return change + share * step.years * history.slope(beyond)

    def _paths(self, latents: Tensor, asked: AttributeChange, history: ScanHistory) -> Tensor:
        """Where the drift expects the scan's patient to have been at each visit, relative to the scan."""
        yearly = [(end - start) / asked.years for start, end in zip(asked.switched, asked.target, strict=True)]
        paths = []
        for time in history.times.tolist():
            before = tuple(start + rate * time for start, rate in zip(asked.switched, yearly, strict=True))
            back = AttributeChange(asked.switched, asked.switched, before, time)
            paths.append(self._predicted(latents, back))
        return torch.stack(paths)

    def _growth(
        self, row: int, start: Tensor, change: Tensor, step: AttributeChange, history: ScanHistory
    ) -> GrowthMeter:
        """How much the structure grows by a change of a scan's latents, by its edge, and by the patient's own line."""
        if self.base is None or self.pictures is None or self.area is None:
            raise RequestError("growth is measured with the base's autoencoder on the scans' pictures")
        before, scan, own, by_edge = self.base.decode(start[None]), self.pictures[row : row + 1], math.nan, math.nan
        if history.years and step.years:
            areas = self.area(torch.cat([history.pictures, scan]))
            own = step.years * float(history.slope(areas.double()))
        if self._edge_share and self.edge is not None:
            smaller = before if self.drift.elapsed(step) > 0 else self.base.decode((start + change)[None])
            by_edge = self.drift.growth(start, step, float(self.edge(smaller)[0]))
        area = float(self.area(before if history.write is None else scan)[0])
        return GrowthMeter(self.base, self.area, area, before[0], history.write, start, change, own, by_edge)


@dataclass(frozen=True, eq=False)
class GrowthMeter:
    """Measures how much a change of a scan's latents makes the biomarker grow, on what would be written."""

    base: BaseModel
    measure: Measure
    area: float
    """Before the change, of the scan or of the reconstruction: as answers are measured."""
    reconstruction: Tensor
    """Of `latents`, `(1,S,S)`."""
    write: Write | None
    latents: Tensor
    """Of the scan, after the edit's earlier steps `(C,h,w)`."""
    change: Tensor
    """`(C,h,w)`."""
    own: float
    """Growth by the patient's own straight line; NaN without visits, or where one does not show the structure."""
    by_edge: float
    """Growth by the scan's own edge; NaN where the drift does not tell it."""

    def drawn(self, factor: float) -> float:
        """Growth by the change times a factor."""
        answer = self.base.decode((self.latents + factor * self.change)[None])[0]
        written = answer if self.write is None else self.write(self.reconstruction, answer)
        return float(self.measure(written[None])[0]) - self.area


def _factor(growths: Sequence[GrowthMeter], weight: float, edge_share: float) -> float:
    """The factor of the change by which the growth that is drawn, summed over the scans, reaches its goal.

    Args:
        growths: of the scans; those that do not tell what the goal needs are left out.
        weight: of the patient's own line; 0 without visits.
        edge_share: of the edge's growth in the rest of the goal.
    """
    measured = [growth for growth in growths if not weight or math.isfinite(growth.own)]
    drawn, factor = sum(growth.drawn(1.0) for growth in measured), 1.0
    goal = drawn
    if edge_share:
        goal = edge_share * sum(growth.by_edge for growth in measured) + (1 - edge_share) * drawn
    if weight:
        goal = weight * sum(growth.own for growth in measured) + (1 - weight) * goal
    before, nearest = (0.0, 0.0), (math.inf, factor)
    for _ in range(SCALINGS):
        nearest = min(nearest, (abs(drawn - goal), factor))
        # no scaling reaches a goal of the other sign, and a structure that is not seen has no area
        if not math.isfinite(goal) or not drawn * goal > 0 or abs(drawn - goal) <= CLOSE * abs(goal):
            break
        rise = (drawn - before[1]) / (factor - before[0]) if factor != before[0] else 0.0
        before, rises = (factor, drawn), rise * goal > 0
        factor = factor + (goal - drawn) / rise if rises else factor * goal / drawn
        factor = min(max(factor, LEAST_FACTOR), LARGEST_FACTOR)
        drawn = sum(growth.drawn(factor) for growth in measured)
    return min(nearest, (abs(drawn - goal), factor))[1]
