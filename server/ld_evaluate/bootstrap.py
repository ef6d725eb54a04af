"""Confidence intervals by resampling patients."""

from __future__ import annotations

import numpy as np

from ld_common.core.seeding import numpy_generator

RESAMPLES = 2000


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
    drawn = numpy_generator(0, "interval").integers(0, len(numerators), (RESAMPLES, len(numerators)))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = numerators[drawn].sum(1) / denominators[drawn].sum(1)
    low, high = np.quantile(means[np.isfinite(means)], (0.025, 0.975))
    return {f"{key}_low": float(low), f"{key}_high": float(high)}
