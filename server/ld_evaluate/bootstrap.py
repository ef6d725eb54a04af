"""Confidence intervals by resampling patients."""

from __future__ import annotations

import numpy as np

from ld_common.core.seeding import numpy_generator

RESAMPLES = 2000
FEWEST = 5
"""Patients without whom a correlation says nothing."""


def bootstrap_interval(
    key: str, groups: np.ndarray, values: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, float]:
    """`<key>_low` and `<key>_high`: the central 95 % of the mean when the groups are resampled with replacement.

    Args:
        key: name of the measure.
        groups: the patient of each value, `(N,)`.
        values: `(N,)`.
        weights: divisor of the sum of values, `(N,)`; None for their number.
    """
    group_numbers = np.unique(groups, return_inverse=True)[1]
    numerators = np.bincount(group_numbers, values)
    denominators = np.bincount(group_numbers, weights)
    drawn = _draws(len(numerators))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = numerators[drawn].sum(1) / denominators[drawn].sum(1)
    return _ends(key, means)


def correlation_interval(key: str, first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """`<key>`, `<key>_low` and `<key>_high` of the correlation over patients `(N,)`.

    Empty for fewer than `FEWEST`, or where one does not vary.
    """
    if len(first) < FEWEST or not (np.ptp(first) > 0 and np.ptp(second) > 0):
        return {}
    drawn = _draws(len(first))
    parts = (values[drawn] - values[drawn].mean(1, keepdims=True) for values in (first, second))
    one, other = parts
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = (one * other).sum(1) / np.sqrt((one**2).sum(1) * (other**2).sum(1))
    return {key: float(np.corrcoef(first, second)[0, 1])} | _ends(key, correlations)


def _draws(patients: int) -> np.ndarray:
    return numpy_generator(0, "interval").integers(0, patients, (RESAMPLES, patients))


def _ends(key: str, values: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(values[np.isfinite(values)], (0.025, 0.975))
    return {f"{key}_low": float(low), f"{key}_high": float(high)}
