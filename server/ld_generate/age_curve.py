"""A sweep over age as a curve: the drawn biomarker with its band, the patient's scans, and the cohort's curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ld_common.metrics.bands import Band
from ld_common.metrics.cohort import CohortCurve
from ld_generate.samples import SYNTHETIC, save_figure

INCHES = (7.0, 4.4)
POINTS = 200
"""Places at which a band is drawn."""
DRAWN, COHORT = "#1f5fa8", "#8a8a8a"
JUDGED, EXTRAPOLATED = "judged", "extrapolated"


@dataclass(frozen=True, eq=False)
class AgeContext:
    """What is shown beside the drawn answers."""

    band: Band | None = None
    cohort: CohortCurve | None = None
    visits: Sequence[tuple[float, float]] = ()
    """Age in years and the biomarker in mm2 of each earlier scan."""


@dataclass(frozen=True, eq=False)
class AgeCurve:
    """One biomarker of a sweep over age."""

    biomarker: str
    scan: tuple[float, float]
    """Age of the scan in years, and its biomarker in mm2."""
    ages: Sequence[float]
    """Of the answers."""
    areas_mm2: Sequence[float]
    """Of the answers."""
    context: AgeContext

    def ends(self, age: float, area_mm2: float) -> tuple[float, float] | None:
        """Lowest and highest biomarker of the band around an answer; None without a band."""
        band = self.context.band
        if band is None:
            return None
        width = float(band.half_width(age - self.scan[0]))
        return max(area_mm2 - width, 0.0), area_mm2 + width

    def columns(self) -> dict[str, list[str]]:
        """Columns of the table: a row for the scan, one for its reconstruction, and one for each answer."""
        name, band, cohort = self.biomarker, self.context.band, self.context.cohort
        ends = [None, None, *(self.ends(age, area) for age, area in zip(self.ages, self.areas_mm2, strict=True))]
        kinds = [
            "" if band is None else JUDGED if band.judged(age - self.scan[0]) else EXTRAPOLATED for age in self.ages
        ]
        ages = [self.scan[0]] * 2 + list(self.ages)
        means = [None if cohort is None else float(cohort.at(age)) for age in ages]
        low, high = (0.0, 0.0) if cohort is None else (cohort.low_mm2, cohort.high_mm2)
        return {
            f"{name}_mm2_low": [_cell(None if pair is None else pair[0]) for pair in ends],
            f"{name}_mm2_high": [_cell(None if pair is None else pair[1]) for pair in ends],
            "band": ["", "", *kinds],
            f"cohort_{name}_mm2": [_cell(value) for value in means],
            f"cohort_{name}_mm2_low": [_cell(None if value is None else value + low) for value in means],
            f"cohort_{name}_mm2_high": [_cell(None if value is None else value + high) for value in means],
        }


def write_age_curve(path: Path, curve: AgeCurve) -> Path:
    """Draw the curve; beyond the years that were judged the band is lighter and its edges are dashed."""
    figure = Figure(figsize=INCHES, layout="constrained")
    axes: Axes = figure.subplots()
    ages = _range(curve)
    if curve.context.cohort is not None:
        _draw_cohort(axes, curve.context.cohort, ages)
    line = sorted([curve.scan, *zip(curve.ages, curve.areas_mm2, strict=True)])
    if curve.context.band is not None:
        _draw_band(axes, curve, curve.context.band, line)
    axes.plot(*zip(*line, strict=True), color=DRAWN, linewidth=1.8, zorder=3)
    axes.plot(curve.ages, curve.areas_mm2, "o", color=DRAWN, markersize=4, label="drawn (synthetic)", zorder=4)
    if curve.context.visits:
        axes.plot(
            *zip(*curve.context.visits, strict=True), "s", color="black", markerfacecolor="white", label="earlier scans"
        )
    axes.plot(*curve.scan, "D", color="black", markersize=7, label="the scan", zorder=5)
    axes.set(xlabel="age in years", ylabel=f"{curve.biomarker} in mm²", xlim=(ages[0], ages[-1]))
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 0))
    axes.grid(alpha=0.25)
    axes.set_title(f"synthetic: {curve.biomarker} drawn at other ages, not a prognosis", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return save_figure(path, figure, SYNTHETIC | {"Description": f"{curve.biomarker} against age"})


def _range(curve: AgeCurve) -> np.ndarray:
    """Ages of the plot: all of its points, and a margin."""
    ages = [curve.scan[0], *curve.ages, *(age for age, _ in curve.context.visits)]
    margin = 0.03 * (max(ages) - min(ages))
    return np.linspace(min(ages) - margin, max(ages) + margin, POINTS)


def _draw_cohort(axes: Axes, cohort: CohortCurve, ages: np.ndarray) -> None:
    ages = ages[np.isfinite(cohort.at(ages))]
    mean = cohort.at(ages)
    names = ", ".join(cohort.categories.values())
    axes.plot(ages, mean, color=COHORT, linewidth=1.4, label=f"cohort, {names}" if names else "cohort")
    low, high = np.maximum(mean + cohort.low_mm2, 0), mean + cohort.high_mm2
    label = f"{100 * cohort.level:.0f} % of the cohort's patients"
    axes.fill_between(ages, low, high, color=COHORT, alpha=0.16, linewidth=0, label=label)


def _draw_band(axes: Axes, curve: AgeCurve, band: Band, line: Sequence[tuple[float, float]]) -> None:
    """Around the drawn line; in three parts, since answers to an earlier age were not judged either."""
    start, (first, last) = curve.scan[0], (line[0][0], line[-1][0])
    limit = start + band.longest_years
    known, drawn = (np.array(values) for values in zip(*line, strict=True))
    label = f"{100 * band.level:.0f} % band ({band.patients} test patients, up to {band.longest_years:g} years)"
    parts = [(start, min(last, limit), True), (limit, last, False), (first, start, False)]
    named: set[str] = set()
    for low_age, high_age, judged in parts:
        if high_age <= low_age:
            continue
        ages = np.linspace(low_age, high_age, POINTS)
        centre, width = np.interp(ages, known, drawn), band.half_width(ages - start)
        low, high = np.maximum(centre - width, 0), centre + width
        title = label if judged else "the same, beyond what was judged (dashed)"
        axes.fill_between(
            ages, low, high, color=DRAWN, alpha=0.22 if judged else 0.08, linewidth=0, label=_once(title, named)
        )
        for edge in (low, high):
            axes.plot(ages, edge, color=DRAWN, linewidth=0.8, linestyle="-" if judged else "--", alpha=0.6)


def _once(label: str, named: set[str]) -> str | None:
    """The label, the first time."""
    first = label not in named
    named.add(label)
    return label if first else None


def _cell(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{max(value, 0.0):.6g}"
