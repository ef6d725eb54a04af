"""A cohort's curve: how a biomarker depends on age in a group of patients, and how far its patients lie from it.

Least squares of the biomarker on age, for patients with each combination of categories (sex and diagnosis, say). Of
four models the one that predicts left-out patients best is taken, a larger one only where it is better by `GAIN`:

    shift        one slope for all, and a difference for each category
    shift, age²  the same with a bend
    own          each combination has its own line
    own, age²    each combination has its own curve

It is a cross-section: patients of different ages, not one patient growing older.
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
from ld_common.metrics.bands import FEWEST_PATIENTS, LEVEL

CENTRE_YEARS, SPAN_YEARS = 70.0, 10.0
"""A curve is a polynomial of (age - centre) / span."""
FEWEST_IN_GROUP = 5
"""Fewest patients of a combination that gets a curve."""
OWN_SPREAD = 20
"""Fewest patients of a combination whose spread is its own; that of fewer is the whole cohort's."""
FOLDS = 20
"""Most groups of patients that are left out in turn."""
GAIN = 0.99
"""Error over that of the smaller model, below which the larger one is taken."""
AGE_STEP = 5.0
"""Ends of a curve are multiples of this, so that no patient's age is told."""
MODELS = ((False, 1), (False, 2), (True, 1), (True, 2))
"""Whether a combination has its own curve, and the degree."""


@dataclass(frozen=True)
class CohortCurve:
    """A biomarker against age, of the patients with one combination of categories."""

    categories: dict[str, str]
    coefficients: list[float]
    """In mm2, of powers of (age - `CENTRE_YEARS`) / `SPAN_YEARS`, from 0."""
    low_mm2: float
    """Of the patients, (1 - level) / 2 lie further below the curve than this (below 0) ..."""
    high_mm2: float
    """... and as many further above it than this."""
    level: float
    youngest: float
    oldest: float
    """Ends of the curve in years; it says nothing beyond."""
    patients: int

    def at(self, ages: ArrayLike) -> np.ndarray:
        """The curve in mm2 at ages, of their shape; not a number beyond its ends."""
        years = np.asarray(ages, float)
        values = np.polynomial.polynomial.polyval((years - CENTRE_YEARS) / SPAN_YEARS, self.coefficients)
        known: np.ndarray = np.where((years >= self.youngest) & (years <= self.oldest), values, np.nan)
        return known

    def state(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> CohortCurve:
        """A curve from JSON; raises `ReleaseError` for other content."""
        try:
            curve = cls(
                categories={str(name): str(value) for name, value in state["categories"].items()},
                coefficients=[float(value) for value in state["coefficients"]],
                **{name: float(state[name]) for name in ("low_mm2", "high_mm2", "level", "youngest", "oldest")},
                patients=int(state["patients"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ReleaseError(f"a cohort's curve cannot be read ({error!r}): evaluate the release again") from error
        numbers = [*curve.coefficients, curve.low_mm2, curve.high_mm2, curve.level, curve.youngest, curve.oldest]
        if not curve.coefficients or not all(map(math.isfinite, numbers)):
            raise ReleaseError(f"a cohort's curve has impossible numbers, {numbers}: evaluate the release again")
        return curve


def fit_cohort(
    ages: ArrayLike,
    areas_mm2: ArrayLike,
    patients: Sequence[str],
    categories: Sequence[Mapping[str, str]],
    level: float = LEVEL,
) -> list[CohortCurve]:
    """A curve for each combination of categories with `FEWEST_IN_GROUP` patients; a patient counts once.

    Args:
        ages: of N scans in years.
        areas_mm2: the biomarker of each.
        patients: who it is of.
        categories: the categories of each.
        level: share of patients within the spread.

    Raises:
        RequestError: fewer than `FEWEST_PATIENTS`, or a number that is not finite.
    """
    years, areas = np.asarray(ages, float), np.asarray(areas_mm2, float)
    rows = np.unique(np.asarray(patients, str), return_inverse=True)[1]
    count = int(rows.max()) + 1 if len(rows) else 0
    if count < FEWEST_PATIENTS:
        raise RequestError(f"a cohort's curve needs {FEWEST_PATIENTS} patients, not {count}")
    if not (np.isfinite(years).all() and np.isfinite(areas).all()):
        raise RequestError("a cohort's curve needs ages and areas that are numbers")
    cohort = _Cohort((years - CENTRE_YEARS) / SPAN_YEARS, areas, rows, [tuple(sorted(c.items())) for c in categories])
    own, degree, residuals = cohort.best_model()
    coefficients, curves = cohort.fit(own, degree, np.ones(len(areas), bool)), []
    for number, names in enumerate(cohort.groups):
        inside = cohort.group == number
        size = len(np.unique(rows[inside]))
        if size < FEWEST_IN_GROUP:
            continue
        spread = inside if size >= OWN_SPREAD else np.ones(len(areas), bool)
        low, high = _quantiles(residuals[spread], cohort.weights[spread], level)
        youngest, oldest = _quantiles(years[inside], cohort.weights[inside], level)
        curves.append(
            CohortCurve(
                categories=dict(names),
                coefficients=[round(float(value), 3) for value in coefficients[number]],
                low_mm2=round(low, 3),
                high_mm2=round(high, 3),
                level=level,
                youngest=AGE_STEP * math.floor(youngest / AGE_STEP),
                oldest=AGE_STEP * math.ceil(oldest / AGE_STEP),
                patients=size,
            )
        )
    return curves


class _Cohort:
    """The scans, and the models that are fitted to them."""

    def __init__(
        self,
        times: np.ndarray,
        areas: np.ndarray,
        rows: np.ndarray,
        combinations: Sequence[tuple[tuple[str, str], ...]],
    ) -> None:
        self.times, self.areas, self.rows = times, areas, rows
        self.groups = sorted(set(combinations))
        self.group = np.array([self.groups.index(combination) for combination in combinations])
        self.weights = 1 / np.bincount(rows)[rows]
        values = sorted({pair for combination in self.groups for pair in combination})
        self.marks = np.array([[pair in combination for pair in values] for combination in self.groups], float)

    def powers(self, degree: int) -> np.ndarray:
        """Powers of each scan's time from 0 to `degree`, `(N,degree+1)`."""
        return np.stack([self.times**power for power in range(degree + 1)], 1)

    def fit(self, own: bool, degree: int, used: np.ndarray) -> np.ndarray:
        """Coefficients of each combination `(G,degree+1)`, from the scans that are used, bool `(N,)`."""
        powers, root = self.powers(degree), np.sqrt(self.weights * used)[:, None]
        if own:
            member = self.group[:, None] == np.arange(len(self.groups))
            design = (member[:, :, None] * powers[:, None]).reshape(len(powers), -1)
            return _least_squares(design * root, self.areas * root[:, 0]).reshape(len(self.groups), -1)
        design = np.concatenate([powers, self.marks[self.group]], 1)
        solution = _least_squares(design * root, self.areas * root[:, 0])
        coefficients = np.tile(solution[: degree + 1], (len(self.groups), 1))
        coefficients[:, 0] += self.marks @ solution[degree + 1 :]
        return coefficients

    def best_model(self) -> tuple[bool, int, np.ndarray]:
        """The model of `MODELS` with the least absolute error on patients left out, and its errors of them `(N,)`."""
        count = int(self.rows.max()) + 1
        folds = numpy_generator(0, "cohort").permutation(count)[self.rows] % min(count, FOLDS)
        best, least = (*MODELS[0], self.areas), math.inf
        for own, degree in MODELS:
            errors = np.zeros(len(self.areas))
            for fold in range(int(folds.max()) + 1):
                left_out = folds == fold
                coefficients = self.fit(own, degree, ~left_out)[self.group[left_out]]
                predicted = np.einsum("np,np->n", self.powers(degree)[left_out], coefficients)
                errors[left_out] = self.areas[left_out] - predicted
            error = float(np.abs(errors) @ self.weights)
            if error < GAIN * least:
                best, least = (own, degree, errors), error
        return best


def _least_squares(design: np.ndarray, values: np.ndarray) -> np.ndarray:
    solution: np.ndarray = np.linalg.lstsq(design, values, rcond=None)[0]
    return solution


def _quantiles(values: np.ndarray, weights: np.ndarray, level: float) -> tuple[float, float]:
    ends = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(values, ends, weights=weights, method="inverted_cdf")
    return float(low), float(high)
