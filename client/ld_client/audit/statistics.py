"""Rates and areas with confidence intervals, and the smallest effects that a test can detect.

Intervals are two-sided; "detected" means that the lower end lies above chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import beta, hypergeom, norm, rankdata

from ld_common.core.errors import LdError

POWER = 0.8
"""Probability of detecting a leak of the smallest detectable size."""
FEWEST_ON_EACH_SIDE = 2
EDGE = 1e-12

Scores = NDArray[np.float64]


class AuditError(LdError):
    """An audit is not possible with these patients, scores or images."""

    code = "audit"


@dataclass(frozen=True)
class Share:
    """A share with its exact (Clopper-Pearson) interval."""

    count: int
    total: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Area:
    """Area under the ROC curve: the probability that a member scores above a held-out patient; ties count half."""

    value: float
    low: float
    high: float
    smallest_detectable: float | None
    """The smallest true area that is detected with probability `POWER`; None for no area."""


@dataclass(frozen=True)
class OperatingPoint:
    """The true positive rate of an attack at a given false positive rate."""

    false_positive_rate: float
    false_positives: int
    """Number of false positives: the rate times the held-out patients, rounded down."""
    true_positive_rate: Share | None
    """Its interval takes the threshold, which the held-out patients set, as given."""
    chance: float | None
    """Exact p-value of the rate if members and held-out patients do not differ."""
    smallest_detectable: float | None
    """The smallest true rate that is detected with probability `POWER`; None for no rate."""
    note: str
    """Why the rate cannot be measured, or empty."""


def share(count: int, total: int, confidence: float = 0.95) -> Share:
    """A share with its exact interval (Clopper and Pearson 1934).

    Raises:
        AuditError: not 0 <= count <= total, or no trial.
    """
    _check_confidence(confidence)
    if total < 1 or not 0 <= count <= total:
        raise AuditError(f"{count} of {total} is not a share: give at least one trial, and no more hits than trials")
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, count, total - count + 1)) if count else 0.0
    high = float(beta.ppf(1 - tail, count + 1, total - count)) if count < total else 1.0
    return Share(count, total, count / total, low, high)


def area_under_curve(members: Sequence[float], held_out: Sequence[float], confidence: float = 0.95) -> Area:
    """The area under the ROC curve with its score interval (Newcombe 2006, method 5).

    At an area of 0.5 its variance is that of the Mann-Whitney test, so the interval excludes 0.5 where that test
    rejects; unlike DeLong's interval, it has a width at an area of 1, which an overfitted model reaches.

    Args:
        members: one score a patient, higher for likelier members.
        held_out: the same for patients who were not trained on.
        confidence: of the interval.

    Raises:
        AuditError: fewer than two patients on a side, or a score that is not finite.
    """
    _check_confidence(confidence)
    inside, outside = _checked(members, "member"), _checked(held_out, "held-out")
    m, n = len(inside), len(outside)
    ranks = rankdata(np.concatenate([inside, outside]))
    value = float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))
    z = float(norm.ppf((1 + confidence) / 2))

    def too_far(area: float, side: int) -> float:
        return side * (value - area) - z * math.sqrt(_area_variance(area, m, n))

    # the variance is 0 at 0 and 1: the search for the ends of the interval stops short of them
    low = brentq(too_far, 0.0, min(value, 1 - EDGE), args=(1,)) if value > 0 else 0.0
    high = brentq(too_far, max(value, EDGE), 1.0, args=(-1,)) if value < 1 else 1.0
    return Area(value, float(low), float(high), _smallest_area(m, n, z))


def operating_point(
    members: Sequence[float], held_out: Sequence[float], false_positive_rate: float, confidence: float = 0.95
) -> OperatingPoint:
    """The true positive rate at a false positive rate; scores as for `area_under_curve`.

    The threshold is the score of a held-out patient, without interpolation: with fewer than 1 / rate of them, the rate
    cannot be measured, and `note` says so.

    Raises:
        AuditError: as `area_under_curve`, or a rate outside (0, 1).
    """
    _check_confidence(confidence)
    inside, outside = _checked(members, "member"), _checked(held_out, "held-out")
    if not 0 < false_positive_rate < 1:
        raise AuditError(f"the false positive rate is {false_positive_rate:g}: use a value between 0 and 1, as 0.01")
    m, n = len(inside), len(outside)
    allowed = math.floor(false_positive_rate * n + 1e-9)
    if allowed < 1:
        needed = math.ceil(1 / false_positive_rate - 1e-9)
        note = f"a false positive rate of {false_positive_rate:g} needs {needed} held-out patients, there are {n}"
        return OperatingPoint(false_positive_rate, 0, None, None, None, note)
    threshold = np.sort(outside)[-1 - allowed]
    named = int((inside > threshold).sum())
    return OperatingPoint(
        false_positive_rate=false_positive_rate,
        false_positives=allowed,
        true_positive_rate=share(named, m, confidence),
        chance=_chance_of_naming(named, m, n, allowed),
        smallest_detectable=_smallest_rate(m, n, allowed, (1 - confidence) / 2),
        note="",
    )


def _chance_of_naming(named: int, members: int, held_out: int, allowed: int) -> float:
    """P(at least `named` members above the held-out score of rank `allowed` + 1) if all orders are equally likely.

    Equivalently: at most `allowed` of the `named` + `allowed` highest scores are of held-out patients.
    """
    return float(hypergeom.cdf(allowed, members + held_out, held_out, named + allowed))


def _smallest_rate(members: int, held_out: int, allowed: int, tail: float) -> float | None:
    critical = next((x for x in range(members + 1) if _chance_of_naming(x, members, held_out, allowed) <= tail), None)
    # the rate at which a binomial count of members reaches `critical` with probability POWER
    return None if critical is None else float(beta.ppf(POWER, critical, members - critical + 1))


def _area_variance(area: float, members: int, held_out: int) -> float:
    """Hanley and McNeil's variance with Newcombe's symmetric N*."""
    balanced = (members + held_out) / 2 - 1
    spread = (1 - area) / (2 - area) + area / (1 + area)
    return area * (1 - area) * (1 + balanced * spread) / (members * held_out)


def _smallest_area(members: int, held_out: int, z: float) -> float | None:
    critical = 0.5 + z * math.sqrt(_area_variance(0.5, members, held_out))
    if critical >= 1:
        return None
    ahead = float(norm.ppf(POWER))

    def excess(area: float) -> float:
        return area - ahead * math.sqrt(_area_variance(area, members, held_out)) - critical

    return float(brentq(excess, critical, 1.0))


def _checked(scores: Sequence[float], whose: str) -> Scores:
    values = np.asarray(scores, dtype=np.float64)
    if len(values) < FEWEST_ON_EACH_SIDE:
        raise AuditError(f"there are {len(values)} {whose} patients: an audit needs {FEWEST_ON_EACH_SIDE} or more")
    if not np.isfinite(values).all():
        raise AuditError(f"a {whose} patient's score is not finite: the model or its latents hold NaN or infinity")
    return values


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise AuditError(f"the confidence is {confidence:g}: use a value between 0 and 1, as 0.95")
