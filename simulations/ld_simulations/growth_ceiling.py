"""How well any method can foretell the growth of a patient's ventricles from one scan.

The patient's own rate of ageing is not in the picture, only its result so far. With all else known, widening E and
thinning T (causal.py) are two noisy readings of the rate r: E = cap(start + v + 0.24 r b), T = 0.021 r b + c, where
b is the burden at rate 1. A perfect reader of the scan, its attributes and the edit predicts best by the posterior
mean of the change, E[A' - A | E, T, b], an integral over r alone; no prediction correlates more with the truth.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats

from ld_common.modality import Attributes
from ld_common.seeding import numpy_generator
from ld_simulations.anatomy import SERIES_Z_MM
from ld_simulations.causal import (
    CORTEX_SD,
    RATE_LIMITS,
    RATE_SD,
    SLICE_HEIGHT_LIMIT_MM,
    THINNING_PER_YEAR,
    VENTRICLE_SD_MM,
    WIDENING_HIGHEST_MM,
    WIDENING_LOWEST_MM,
    WIDENING_MM_PER_YEAR,
    WIDENING_START_MM,
    Noise,
    Patient,
    Population,
    State,
    burden_years,
    capped,
    draw_patient,
    edits_of,
    render_state,
    state_of,
    ventricle_area_mm2,
)

Numbers = NDArray[np.float64]

CURVE_HEIGHTS, CURVE_WIDENINGS = 5, 24
CURVE_SHAPE, CURVE_SPACING_MM = (104, 88), 2.0
RATE_QUANTILES = 101


@dataclass(frozen=True)
class GrowthCeiling:
    """Highest reachable correlation between predicted and true change of the ventricles' area in the middle slice."""

    overall: float
    """Over all patients and edits together; most of it is told by the edit alone."""
    by_edit: dict[str, float]
    """Over patients, for each edit."""


def growth_ceiling(populations: Sequence[Population], patients: int = 4000, seed: int = 0) -> GrowthCeiling:
    """The ceiling over `patients` drawn from the populations in turn, at their first visit, under all edits but sex.

    True changes come from a curve of area against widening, rendered once with an unwarped head for a few heights of
    the slice; the head's size scales both area and change. The best prediction is the posterior mean of the change
    given exact widening, thinning, size and height (module docstring), integrated over quantiles of the rate's prior.
    Warps are left out: they scale a patient's area and its change alike and are visible in the scan.
    """
    rng = numpy_generator(seed, "growth-ceiling")
    true: dict[str, list[float]] = {}
    best: dict[str, list[float]] = {}
    for index in range(patients):
        patient = draw_patient(rng, str(index), populations[index % len(populations)])
        attributes = patient.attributes()
        for name, target in edits_of(attributes).items():
            if "sex" not in target:
                change, predicted = _change(patient, attributes, {**attributes, **target})
                true.setdefault(name, []).append(change)
                best.setdefault(name, []).append(predicted)
    by_edit = {name: _correlation(true[name], best[name]) for name in true}
    together = (list(itertools.chain.from_iterable(values.values())) for values in (true, best))
    return GrowthCeiling(_correlation(*together), by_edit)


def _change(patient: Patient, attributes: Attributes, target: Attributes) -> tuple[float, float]:
    """True change of area and its posterior mean, mm2 for a head of size 1."""
    noise = patient.noise
    before, after = (
        burden_years(float(values["age"]), str(values["diagnosis"]), 1.0) for values in (attributes, target)
    )
    raw = WIDENING_START_MM + noise.ventricle_mm + WIDENING_MM_PER_YEAR * noise.rate * before
    thinning = noise.cortex + THINNING_PER_YEAR * noise.rate * before
    rates = _rate_quantiles()
    unexplained = ((raw - WIDENING_START_MM - WIDENING_MM_PER_YEAR * before * rates) / VENTRICLE_SD_MM) ** 2
    unexplained += ((thinning - THINNING_PER_YEAR * before * rates) / CORTEX_SD) ** 2
    weights = np.exp(-0.5 * (unexplained - unexplained.min()))
    further = WIDENING_MM_PER_YEAR * (after - before)
    later = _area(raw + further * np.append(rates, noise.rate), noise.height_mm)
    scale = state_of(noise, attributes).size ** 2
    now = _area(np.array([raw]), noise.height_mm)[0]
    return scale * (later[-1] - now), scale * (float(np.average(later[:-1], weights=weights)) - now)


def _area(raw_widening_mm: Numbers, height_mm: float) -> Numbers:
    """Area in mm2 by the curve, for widenings before their cap."""
    widening = (capped(raw_widening_mm) - WIDENING_LOWEST_MM) / (WIDENING_HIGHEST_MM - WIDENING_LOWEST_MM)
    height = (height_mm / SLICE_HEIGHT_LIMIT_MM + 1) / 2
    at = np.stack([np.full_like(widening, height * (CURVE_HEIGHTS - 1)), widening * (CURVE_WIDENINGS - 1)])
    area: Numbers = ndimage.map_coordinates(_area_curve(), at, order=1, mode="nearest")
    return area


@functools.cache
def _area_curve() -> Numbers:
    """Area of an unwarped head's ventricles in mm2, `(heights, widenings)`."""
    plain = np.zeros((1, 3), np.float32)
    areas = np.empty((CURVE_HEIGHTS, CURVE_WIDENINGS))
    heights = np.linspace(-SLICE_HEIGHT_LIMIT_MM, SLICE_HEIGHT_LIMIT_MM, CURVE_HEIGHTS)
    widenings = np.linspace(WIDENING_LOWEST_MM, WIDENING_HIGHEST_MM, CURVE_WIDENINGS)
    for row, height in enumerate(heights):
        noise = Noise(0, 0, 1, 0, plain, plain[0, :1], plain, plain[0], float(height), plain[0], 0)
        for column, widening in enumerate(widenings):
            state = State(1.0, float(widening), 0.0)
            rendering = render_state(noise, state, CURVE_SHAPE, CURVE_SPACING_MM, SERIES_Z_MM[1])
            areas[row, column] = ventricle_area_mm2(rendering)
    return areas


@functools.cache
def _rate_quantiles() -> Numbers:
    shares = (np.arange(RATE_QUANTILES) + 0.5) / RATE_QUANTILES
    rates: Numbers = np.clip(np.exp(RATE_SD * stats.norm.ppf(shares)), *RATE_LIMITS)
    return rates


def _correlation(first: list[float], second: list[float]) -> float:
    return float(np.corrcoef(first, second)[0, 1])
