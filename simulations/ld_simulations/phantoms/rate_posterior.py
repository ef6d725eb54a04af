"""Posterior of a patient's rate of ageing given one image.

The rate r is not visible in an image, only its result so far: with all else known, each endogenous variable that it
drives is a noisy reading x = start + slope r + noise. The posterior is an integral over r alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

Numbers = NDArray[np.float64]
RATE_QUANTILES = 101


@dataclass(frozen=True)
class Reading:
    """One reading of the rate, its start taken off: `value` = `slope` times the rate + noise of deviation `sd`."""

    value: float
    slope: float
    sd: float


def rate_quantiles(sd: float, limits: tuple[float, float]) -> Numbers:
    """Equally likely rates of the prior: log-normal about 1, clipped to `limits`."""
    shares = (np.arange(RATE_QUANTILES) + 0.5) / RATE_QUANTILES
    rates: Numbers = np.clip(np.exp(sd * ndtri(shares)), *limits)
    return rates


def posterior_weights(rates: Numbers, readings: Sequence[Reading]) -> Numbers:
    """Unnormalised posterior weights of equally likely rates, given the readings."""
    unexplained = np.zeros_like(rates)
    for reading in readings:
        unexplained += ((reading.value - reading.slope * rates) / reading.sd) ** 2
    weights: Numbers = np.exp(-0.5 * (unexplained - unexplained.min()))
    return weights
