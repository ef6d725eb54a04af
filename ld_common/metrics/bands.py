"""Bands around drawn changes, calibrated on patients whose true change is known.

A change that was drawn over t years is off by an error whose scale grows with t:

    s(t) = sqrt(a² + (b t)²)         a: noise of two measurements, b: error a year

The band is drawn ± q s(t). Its shape, a against b, is fitted by Laplace maximum likelihood; its factor q is the
quantile of split conformal prediction (Vovk et al. 2005; Lei et al. 2018, arXiv 1604.04173) over the scaled errors of
patients who were not used to fit the shape. Several answers of one patient are not exchangeable with those of others,
so patients count, not answers (hierarchical conformal prediction, Lee, Barber and Willett, arXiv 2306.06342, Eq. 6):
the answers of one patient share a patient's weight, and of n patients each has 1/(n+1). With one answer a patient, q is
the ceil((n+1) level)-th smallest scaled error.

Then the answer to a new patient, drawn at random from those that this patient could be asked, covers the truth with
probability `level` or more, whatever the law of the errors, if the new patient is exchangeable with the n: of the same
kind, scanned and asked alike. It is no statement about a patient of another kind, or about one number of years alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ld_common.core.errors import ReleaseError, RequestError
from ld_common.core.seeding import numpy_generator

LEVEL = 0.9
"""Share of the answers that a band covers."""
FEWEST_PATIENTS = 20
"""Fewer patients get no band."""
SPLIT_FROM = 30
"""Fewest patients of whom a third fits the shape and the others the factor; fewer do both."""
SMALLEST_NOISE_MM2 = 1e-3
JUDGED_BY = 5
"""Patients who must have been judged over a number of years for the band to be more than an extrapolation."""
ANGLES = (np.arange(180) + 0.5) / 180 * np.pi / 2
"""Shapes that are tried: cos is the share of a, sin that of b over the longest time."""


@dataclass(frozen=True)
class Band:
    """The band of one biomarker."""

    noise_mm2: float
    """a."""
    noise_mm2_per_year: float
    """b."""
    factor: float
    """q."""
    level: float
    patients: int
    """Who calibrated it."""
    answers: int
    """Of these patients."""
    longest_years: float
    """At least `JUDGED_BY` patients were judged over as many years; beyond, the band extrapolates."""
    split: bool
    """Whether shape and factor are of different patients; otherwise the coverage is approximate."""

    def half_width(self, years: ArrayLike) -> np.ndarray:
        """Half the band's width in mm2 after (or before) `years`, of their shape.

        It is not 0 at 0 years: there it is what a second measurement of the same patient may differ.
        """
        scale: np.ndarray = self.factor * np.hypot(self.noise_mm2, self.noise_mm2_per_year * np.asarray(years, float))
        return scale

    def covers(self, errors: ArrayLike, years: ArrayLike) -> np.ndarray:
        """Whether errors in mm2 of drawn changes lie within the band, bool of their shape."""
        inside: np.ndarray = np.abs(np.asarray(errors, float)) <= self.half_width(years)
        return inside

    def judged(self, years: float) -> bool:
        """Whether answers this many years later were judged; those to an earlier age were not."""
        return 0 <= years <= self.longest_years

    def state(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Band:
        """A band from JSON; raises `ReleaseError` for other content."""
        try:
            numbers = {name: float(state[name]) for name in NUMBERS}
            band = cls(**numbers, patients=int(state["patients"]), answers=int(state["answers"]), split=state["split"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ReleaseError(f"a band cannot be read ({error!r}): evaluate the release again") from error
        if not all(math.isfinite(value) and value >= 0 for value in numbers.values()) or not 0 < band.level < 1:
            raise ReleaseError(f"a band has impossible numbers, {numbers}: evaluate the release again")
        return band


NUMBERS = ("noise_mm2", "noise_mm2_per_year", "factor", "level", "longest_years")


def fit_band(errors: ArrayLike, years: ArrayLike, patients: Sequence[str], level: float = LEVEL) -> Band:
    """Calibrate a band; the order of the answers plays no part.

    Args:
        errors: drawn less true change of N answers in mm2.
        years: time that each answer passed, above 0.
        patients: who it is of.
        level: share of answers that the band shall cover.

    Raises:
        RequestError: fewer than `FEWEST_PATIENTS`, or too few for the level; an error that is not a number; a time of
            0 or less.
    """
    sizes, times = np.abs(np.asarray(errors, float)), np.asarray(years, float)
    names, rows = np.unique(np.asarray(patients, str), return_inverse=True)
    count = len(names)
    needed = max(FEWEST_PATIENTS, _fewest(level))
    if count < needed:
        raise RequestError(f"a band of level {level:g} needs {needed} patients with a known truth, not {count}")
    if not (np.isfinite(sizes).all() and np.isfinite(times).all() and times.min() > 0):
        raise RequestError("a band needs errors that are numbers, and times above 0")
    order = numpy_generator(0, "band").permutation(count)
    fitting = max(count // 3, 1) if count >= SPLIT_FROM and count - count // 3 >= _fewest(level) else 0
    fits, checks = (np.isin(rows, order[:fitting]), np.isin(rows, order[fitting:])) if fitting else (slice(None),) * 2
    noise, noise_per_year = _scale(sizes[fits], times[fits], rows[fits], float(times.max()))
    scores = sizes[checks] / np.hypot(noise, noise_per_year * times[checks])
    return Band(
        noise_mm2=noise,
        noise_mm2_per_year=noise_per_year,
        factor=math.ceil(1000 * conformal_quantile(scores, rows[checks], level)) / 1000,
        level=level,
        patients=count,
        answers=len(sizes),
        longest_years=_longest(times, rows),
        split=fitting > 0,
    )


def coverage(band: Band, errors: ArrayLike, years: ArrayLike, patients: Sequence[str]) -> float:
    """Share of answers within a band, each patient counting once; of patients who did not calibrate it.

    Args:
        band: of `fit_band`.
        errors: as in `fit_band`.
        years: as in `fit_band`.
        patients: as in `fit_band`.
    """
    rows = np.unique(np.asarray(patients, str), return_inverse=True)[1]
    return float(np.average(band.covers(errors, years), weights=1 / np.bincount(rows)[rows]))


def conformal_quantile(scores: np.ndarray, patients: np.ndarray, level: float) -> float:
    """The smallest score whose weight with all below it reaches `level`; infinite where too few patients reach it.

    Args:
        scores: `(N,)`.
        patients: number of each score's patient, `(N,)`.
        level: between 0 and 1.
    """
    rows = np.unique(patients, return_inverse=True)[1]
    answers = np.bincount(rows)
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum(1 / ((len(answers) + 1) * answers[rows[order]]))
    # a sum of rounded weights may lie just below the level that it reaches
    place = int(np.searchsorted(reached, level - 1e-9))
    return float(scores[order[place]]) if place < len(order) else math.inf


def _fewest(level: float) -> int:
    """Patients without whom no score reaches the level."""
    return math.ceil(level / (1 - level) - 1e-9)


def _scale(sizes: np.ndarray, times: np.ndarray, rows: np.ndarray, longest: float) -> tuple[float, float]:
    """a and b of errors of these sizes; a patient counts once.

    For one shape u(t) the likelihood's best factor is c = mean(|e|/u), and the loss log c + mean(log u). The shape is
    the mean over all of them, weighted by their likelihood: errors that do not tell a from b give both.
    """
    weights = 1 / np.bincount(rows)[rows]
    weights /= weights.sum()
    shapes = np.hypot(np.cos(ANGLES)[:, None], np.sin(ANGLES)[:, None] * times / longest)
    with np.errstate(divide="ignore"):
        losses = np.log((sizes / shapes) @ weights) + np.log(shapes) @ weights
    if not np.isfinite(losses).all():  # no error at all
        return SMALLEST_NOISE_MM2, 0.0
    likelihoods = np.exp(-len(sizes) * (losses - losses.min()))
    angle = float(ANGLES @ likelihoods / likelihoods.sum())
    factor = float((sizes / np.hypot(np.cos(angle), np.sin(angle) * times / longest)) @ weights)
    noise = max(round(factor * math.cos(angle), 3), SMALLEST_NOISE_MM2)
    return noise, round(factor * math.sin(angle) / longest, 3)


def _longest(times: np.ndarray, rows: np.ndarray) -> float:
    """The longest time over which `JUDGED_BY` patients were judged."""
    longest = np.zeros(rows.max() + 1)
    np.maximum.at(longest, rows, times)
    return math.floor(10 * float(np.sort(longest)[-JUDGED_BY])) / 10
