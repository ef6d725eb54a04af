"""Drifts with intervals over patients, chance levels, distances between sites, and intervals of distances.

A group is what is drawn anew together: a patient with all images, or a source picture with all its crops. Everything
is measured in means by channel `(N,C)` of N pictures, in units of the channel's deviation over everyday pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ld_common.core.seeding import numpy_generator

Values = np.ndarray
"""float64 `(N,C)`."""
ENDS = (0.025, 0.975)
Z95 = 1.959964


def rms(differences: np.ndarray) -> np.ndarray:
    """Root mean square over the last axis, the channels."""
    root: np.ndarray = np.sqrt(np.square(differences).mean(-1))
    return root


def resampled_means(values: Values, groups: Sequence[str], resamples: int, stream: str) -> np.ndarray:
    """Means over pictures `(R,C)` when the groups are drawn with replacement."""
    sums, counts = _by_group(values, groups)
    draws = numpy_generator(0, "real-latents", stream)
    times = draws.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), resamples).astype(float)
    means: np.ndarray = (times @ sums) / (times @ counts)[:, None]
    return means


def drift_estimate(
    values: Values, groups: Sequence[str], others: Values, other_groups: Sequence[str], resamples: int
) -> dict[str, Any]:
    """The difference of means by channel, with 95 % intervals over the groups of both sides.

    Returns:
        `by_channel`, `low` and `high` `(C,)`; `rms` over channels; `corrected`, the rms with the estimate's variance
        subtracted, since noise alone makes an rms, with `corrected_low` and `corrected_high`; `channels_apart`, the
        number of channels whose interval excludes 0 (a twentieth of them by chance); `pictures` and `groups`.
    """
    difference = values.mean(0) - others.mean(0)
    means = resampled_means(values, groups, resamples, "target")
    drawn = means - resampled_means(others, other_groups, resamples, "others")
    low, high = np.quantile(drawn, ENDS, 0)
    return {
        **_rms_with_interval(difference, drawn),
        "channels_apart": int(((low > 0) | (high < 0)).sum()),
        "channels": len(difference),
        "pictures": len(values),
        "groups": len(set(groups)),
        "by_channel": _rounded(difference),
        "low": _rounded(low),
        "high": _rounded(high),
    }


def paired_estimate(differences: Values, groups: Sequence[str], resamples: int) -> dict[str, Any]:
    """`drift_estimate` of the mean of differences `(N,C)` between two versions of the same pictures."""
    return drift_estimate(differences, groups, np.zeros((1, differences.shape[1])), ["none"], resamples)


def chance_of_halves(values: Values, groups: Sequence[str], draws: int) -> dict[str, float]:
    """Median and 95 % quantile of the rms between random halves of the groups, none of which is in both.

    Raises:
        ValueError: there are fewer than two groups.
    """
    sums, counts = _by_group(values, groups)
    if len(counts) < 2:
        raise ValueError("halves need two groups or more")
    random, found = numpy_generator(0, "real-latents", "halves"), []
    for _ in range(draws):
        order = random.permutation(len(counts))
        parts = order[: len(order) // 2], order[len(order) // 2 :]
        first, second = (sums[part].sum(0) / counts[part].sum() for part in parts)
        found.append(float(rms(first - second)))
    return {"chance": float(np.median(found)), "chance_high": float(np.quantile(found, 0.95))}


def site_distances(
    values: Values, patients: Sequence[str], sites: Sequence[str], resamples: int
) -> list[dict[str, Any]]:
    """How far the means of each pair of sites lie apart, rms over channels.

    The interval draws patients anew with all their images; the chance level deals the sites' labels out anew over all
    pairs of a patient and a site. `p` is the share of such deals with a distance as large as the sites' own.
    """
    names = np.array(sites)
    units = [f"{patient}|{site}" for patient, site in zip(patients, sites, strict=True)]
    sums, counts = _by_group(values, units)
    unit_sites = np.array([unit.partition("|")[2] for unit in sorted(set(units))])
    random = numpy_generator(0, "real-latents", "labels")
    deals = [random.permutation(len(unit_sites)) for _ in range(resamples)]
    people = sorted(set(patients))
    weights = random.multinomial(len(people), np.full(len(people), 1 / len(people)), resamples)
    weight_of_picture = weights[:, np.searchsorted(people, patients)].astype(float)
    found = []
    for first, second in combinations(sorted(set(sites)), 2):
        difference = values[names == first].mean(0) - values[names == second].mean(0)
        with np.errstate(invalid="ignore"):
            drawn = _weighted_means(values, weight_of_picture * (names == first)) - _weighted_means(
                values, weight_of_picture * (names == second)
            )
        dealt = np.array([_gap(sums, counts, unit_sites[deal], first, second) for deal in deals])
        distance = float(rms(difference))
        found.append(
            {
                "sites": [first, second],
                **_rms_with_interval(difference, drawn[np.isfinite(drawn).all(1)]),
                "chance": float(np.median(dealt)),
                "chance_high": float(np.quantile(dealt, 0.95)),
                "p": float((1 + (dealt >= distance).sum()) / (1 + len(dealt))),
            }
        )
    return found


def tell_sites(values: Values, patients: Sequence[str], sites: Sequence[str], resamples: int) -> dict[str, Any]:
    """How often a patient's site is the one with the nearest mean, where no mean has seen the patient.

    A case is a patient at a site, with the mean of the images there; the sites' means are over cases. Reported are the
    plain and the balanced accuracy (the mean over sites of the share told right, 1/sites for any constant answer),
    its 95 % interval over patients, and what it is when labels are dealt out anew.
    """
    units = [f"{patient}|{site}" for patient, site in zip(patients, sites, strict=True)]
    sums, counts = _by_group(values, units)
    cases, names = sums / counts[:, None], sorted(set(units))
    owners, labels = (np.array([name.split("|")[part] for name in names]) for part in (0, 1))
    right = _told_right(cases, owners, labels)
    random = numpy_generator(0, "real-latents", "cases")
    people = sorted(set(owners))
    weights = random.multinomial(len(people), np.full(len(people), 1 / len(people)), resamples)
    weights = weights[:, np.searchsorted(people, owners)].astype(float)
    with np.errstate(invalid="ignore"):
        shares = [(weights * (labels == site) @ right) / (weights * (labels == site)).sum(1) for site in set(labels)]
    drawn = np.mean(shares, 0)
    dealt = []
    for _ in range(resamples):
        other = random.permutation(labels)
        dealt.append(_balanced(_told_right(cases, owners, other), other))
    low, high = np.quantile(drawn[np.isfinite(drawn)], ENDS)
    most = max((labels == site).mean() for site in set(labels))
    return {
        "balanced": _balanced(right, labels),
        "balanced_low": float(low),
        "balanced_high": float(high),
        "accuracy": float(right.mean()),
        "majority_accuracy": float(most),
        "chance": float(np.mean(dealt)),
        "chance_high": float(np.quantile(dealt, 0.95)),
        "cases": len(labels),
        "right_by_site": {str(site): float(right[labels == site].mean()) for site in sorted(set(labels))},
    }


def leave_one_out(distance: Callable[[np.ndarray], float], groups: Sequence[str]) -> list[float]:
    """A statistic without each group in turn; `distance` takes the indices of the rows that stay."""
    names = np.array(groups)
    return [float(distance(np.flatnonzero(names != name))) for name in sorted(set(groups))]


def jackknife_variance(left_out: Sequence[float]) -> float:
    """Variance of a statistic from its values without each group (Efron and Stein 1981)."""
    values = np.asarray(left_out, float)
    return float((len(values) - 1) / len(values) * np.square(values - values.mean()).sum())


def seeds_interval(
    values: Sequence[float], left_out: Sequence[Sequence[float]], own_variance: float = 0.0
) -> dict[str, float]:
    """Mean over seeds, and the half width of its 95 % interval over held-out patients and seeds.

    Args:
        values: a distance by seed; one for what has no seed.
        left_out: the same without each held-out patient, by seed.
        own_variance: of the compared set itself, where it has patients as well.
    """
    variance = jackknife_variance(np.mean(left_out, 0).tolist()) + own_variance
    if len(values) > 1:
        variance += float(np.var(values, ddof=1)) / len(values)
    return {"mean": float(np.mean(values)), "half_width": Z95 * variance**0.5}


def split_patients(patients: Sequence[str], sites: Sequence[str], share: float, seed: int) -> set[str]:
    """The patients to hold out: a share of those of each site, by the site that they are seen at first."""
    first: dict[str, str] = {}
    for patient, site in zip(patients, sites, strict=True):
        first.setdefault(patient, site)
    held: set[str] = set()
    for site in sorted(set(first.values())):
        own = sorted(patient for patient, known in first.items() if known == site)
        order = numpy_generator(seed, "real-latents-split", site).permutation(len(own))
        held |= {own[index] for index in order[: round(share * len(own))]}
    return held


def _by_group(values: Values, groups: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sums `(G,C)` and numbers `(G,)` of each group's rows, groups sorted by name."""
    numbers = np.unique(np.array(groups), return_inverse=True)[1]
    sums = np.zeros((numbers.max() + 1, values.shape[1]))
    np.add.at(sums, numbers, values)
    return sums, np.bincount(numbers).astype(float)


def _rms_with_interval(difference: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """Of an estimate `(C,)` and its resampled ones `(R,C)`, whose squares hold the variance twice."""
    variance = float(drawn.var(0).mean())
    low, high = np.sqrt(np.clip(np.quantile(np.square(drawn).mean(1), ENDS) - 2 * variance, 0, None))
    return {
        "rms": float(rms(difference)),
        "corrected": max(float(np.square(difference).mean()) - variance, 0.0) ** 0.5,
        "corrected_low": float(low),
        "corrected_high": float(high),
    }


def _weighted_means(values: Values, weights: np.ndarray) -> np.ndarray:
    """Means `(R,C)` under weights of pictures `(R,N)`; nan where all are 0."""
    means: np.ndarray = (weights @ values) / weights.sum(1, keepdims=True)
    return means


def _gap(sums: np.ndarray, counts: np.ndarray, labels: np.ndarray, first: str, second: str) -> float:
    means = [sums[labels == name].sum(0) / counts[labels == name].sum() for name in (first, second)]
    return float(rms(means[0] - means[1]))


def _told_right(cases: np.ndarray, owners: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each case's site is the nearest, 0 or 1; a patient's cases are in no mean that judges the patient."""
    sites, right = sorted(set(labels)), np.zeros(len(cases))
    for index, case in enumerate(cases):
        others = owners != owners[index]
        distances = [
            np.square(cases[others & (labels == site)].mean(0) - case).sum()
            if (others & (labels == site)).any()
            else np.inf
            for site in sites
        ]
        right[index] = sites[int(np.argmin(distances))] == labels[index]
    return right


def _balanced(right: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean([right[labels == site].mean() for site in set(labels)]))


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]
