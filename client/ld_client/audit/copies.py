"""Searches generated images for copies of training scans, compared with scans of held-out patients.

The distance of two images is the root mean square of their difference, in standard deviations of each channel over all
reference images. On latents it needs no decoding and finds copies, except shifted or mirrored ones; on images
`(N,1,H,W)` it compares grey values. Smooth images are near to everything, so every result compares training patients
with held-out ones.

Indices identify the patients that images copy: results must stay at the site.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ld_client.audit.statistics import AuditError, Share, share
from ld_common.core.seeding import numpy_generator

DISTANCE = "root mean square difference, in standard deviations of each channel"
ROWS = 64
"""Images whose distances are computed at a time."""
Distances = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Reference:
    """Real images of patients, N in all."""

    pictures: Tensor
    """`(N,C,h,w)`: latents, or images, like the generated ones."""
    pseudonyms: list[str]
    """Patient of each."""

    def __post_init__(self) -> None:
        if len(self.pictures) != len(self.pseudonyms) or not self.pseudonyms:
            counts = len(self.pictures), len(self.pseudonyms)
            raise AuditError(
                f"there are {counts[0]} pictures and {counts[1]} pseudonyms: give one each, and at least one"
            )


@dataclass(frozen=True)
class CopyPair:
    """A generated image with its nearest neighbours; indices into the given tensors."""

    generated: int
    training: int
    training_distance: float
    held_out: int
    held_out_distance: float


@dataclass(frozen=True)
class CopyReport:
    """Distances of generated images to training images."""

    distance: str
    patients_on_each_side: int
    """Patients compared for `nearer_to_training`; a random sample of the larger side, with all visits."""
    nearer_to_training: Share
    """Generated images whose nearest neighbour is a training patient's; the interval takes the patients as given."""
    chance_low: float
    """The same share for random splits of the patients: 2.5 % and 97.5 % quantiles."""
    chance_high: float
    chance: float
    """p-value of the share by permutation of the patients."""
    quantile: float
    threshold: float | None
    """`quantile` of the distances from held-out images to their nearest training image; None for too few."""
    closer_than_real: Share | None
    """Generated images nearer to a training image than `threshold`, as a share `quantile` of real images is."""
    note: str
    """Why there is no threshold, or empty."""
    pairs: tuple[CopyPair, ...]
    """The likeliest copies first: least ratio of the distances to training and to held-out pictures."""


def find_copies(
    generated: Tensor,
    training: Reference,
    held_out: Reference,
    quantile: float = 0.05,
    confidence: float = 0.95,
    splits: int = 999,
    shown: int = 24,
    seed: int = 0,
) -> CopyReport:
    """Find the nearest training and held-out neighbours of every generated image.

    Args:
        generated: `(G,C,h,w)`, by the tuned model from prompts of both sides alike.
        training: images of patients who were trained on.
        held_out: images of other patients of the site, chosen at random before training.
        quantile: of real held-out images that count as near as a copy.
        confidence: of the intervals.
        splits: number of random splits of the patients.
        shown: number of pairs to return.
        seed: of the patients and the splits.

    Raises:
        AuditError: shapes differ, a patient is on both sides, a value is not finite, or a number is out of range.
    """
    _check(generated, training, held_out, quantile, splits)
    std = torch.cat([training.pictures, held_out.pictures]).double().std((0, 2, 3), correction=0)
    scale = torch.where(std > 0, std, 1.0)
    to_training = _distances(generated, training.pictures, scale)
    to_held_out = _distances(generated, held_out.pictures, scale)
    real = _distances(held_out.pictures, training.pictures, scale).min(1)
    threshold, note = _threshold(real, quantile)
    closer = None if threshold is None else int((to_training.min(1) < threshold).sum())
    by_patient = _by_patient(to_training, training.pseudonyms), _by_patient(to_held_out, held_out.pseudonyms)
    contest = _contest(*by_patient, splits, numpy_generator(seed, "audit", "copies"))
    return CopyReport(
        distance=DISTANCE,
        patients_on_each_side=contest.patients,
        nearer_to_training=share(contest.nearer, len(generated), confidence),
        chance_low=contest.low,
        chance_high=contest.high,
        chance=contest.chance,
        quantile=quantile,
        threshold=threshold,
        closer_than_real=None if closer is None else share(closer, len(generated), confidence),
        note=note,
        pairs=_pairs(to_training, to_held_out, shown),
    )


@dataclass(frozen=True)
class _Contest:
    """How often training patients were nearest, and the same for random halves of the patients."""

    patients: int
    nearer: int
    low: float
    high: float
    chance: float


def _contest(training: Distances, held_out: Distances, splits: int, generator: np.random.Generator) -> _Contest:
    """Compare equally many random patients of each side, from distances `(G,P)` and `(G,Q)`; then random splits."""
    count = min(training.shape[1], held_out.shape[1])
    sides = [side[:, generator.permutation(side.shape[1])[:count]] for side in (training, held_out)]
    drawn = np.concatenate(sides, axis=1)
    nearer = _nearer_to_first_half(drawn)
    by_chance = np.array([_nearer_to_first_half(generator.permutation(drawn, axis=1)) for _ in range(splits)])
    low, high = np.quantile(by_chance / len(drawn), [0.025, 0.975])
    chance = (1 + (by_chance >= nearer).sum()) / (1 + splits)
    return _Contest(count, nearer, float(low), float(high), float(chance))


def _distances(pictures: Tensor, references: Tensor, scale: Tensor) -> Distances:
    """Distances `(A,B)`, without matrix products, which are too inexact for near copies."""
    flat = [(each.double() / scale[:, None, None]).float().flatten(1) for each in (pictures, references)]
    rows = [torch.cdist(part, flat[1], compute_mode="donot_use_mm_for_euclid_dist") for part in flat[0].split(ROWS)]
    return (torch.cat(rows) / math.sqrt(flat[0].shape[1])).cpu().double().numpy()


def _by_patient(distances: Distances, pseudonyms: Sequence[str]) -> Distances:
    """Distances `(G,N)` to pictures -> `(G,P)` to the nearest picture of each patient, sorted by pseudonym."""
    owners = np.asarray(pseudonyms)
    return np.stack([distances[:, owners == owner].min(1) for owner in np.unique(owners)], axis=1)


def _nearer_to_first_half(distances: Distances) -> int:
    """Rows of `(G,2P)` whose least value lies in the first P columns."""
    middle = distances.shape[1] // 2
    return int((distances[:, :middle].min(1) < distances[:, middle:].min(1)).sum())


def _threshold(real: Distances, quantile: float) -> tuple[float | None, str]:
    """The order statistic of the held-out pictures' distances at `quantile`, or why there is none."""
    rank = math.floor(quantile * len(real) + 1e-9)
    if rank < 1:
        needed = math.ceil(1 / quantile - 1e-9)
        return None, f"a quantile of {quantile:g} needs {needed} held-out pictures, there are {len(real)}"
    return float(np.sort(real)[rank - 1]), ""


def _pairs(to_training: Distances, to_held_out: Distances, shown: int) -> tuple[CopyPair, ...]:
    training, held_out = to_training.argmin(1), to_held_out.argmin(1)
    near, far = to_training.min(1), to_held_out.min(1)
    ratio = near / np.maximum(far, np.finfo(np.float64).tiny)
    return tuple(
        CopyPair(int(row), int(training[row]), float(near[row]), int(held_out[row]), float(far[row]))
        for row in np.argsort(ratio, kind="stable")[:shown]
    )


def _check(generated: Tensor, training: Reference, held_out: Reference, quantile: float, splits: int) -> None:
    pictures = generated, training.pictures, held_out.pictures
    shapes = [tuple(each.shape[1:]) for each in pictures]
    if len(set(shapes)) > 1 or generated.dim() != 4 or not len(generated):
        raise AuditError(f"pictures of shapes {shapes} cannot be compared: give all as (N,C,h,w) of one kind")
    if not all(bool(each.isfinite().all()) for each in pictures):
        raise AuditError("an image holds NaN or infinity and cannot be compared: leave it out")
    both = set(training.pseudonyms) & set(held_out.pseudonyms)
    if both:
        raise AuditError(f"{len(both)} patients are both in training and held out: split by patient, not by visit")
    if not 0 < quantile < 1 or splits < 1:
        raise AuditError(f"quantile is {quantile:g}, splits {splits}: use a quantile between 0 and 1, splits from 1")
