"""How much a structure grows in a year, as a function of the scan, by the speed of its edge.

    dA/dt = L · β · x(z, c),    x = [1, φ(c), p(z)]

A is the area of the modality's first biomarker and L the length of its edge (`ld_common.metrics.registry.EDGES`), so
β · x is how fast the edge moves outward. The same wall speed adds more area to a ventricle with a longer wall: a
patient's own shape decides most of how much grows, and predicted latents, which carry the mean patient's shape, hardly
show it. `longitudinal_fit` solves β from sums over pairs of visits; an answer is scaled until the growth that is
written is this one (`ld_common.editing.moves`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ld_common.core.state import State
from ld_common.diffusion.longitudinal_sums import held_back_folds

READ_PARTS = (8, 16, 32)
"""Numbers of principal components of a scan that are tried."""
SPEED_PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Ridge of a part, as a share of the sum of squares of edge times years."""
SPEED_FEATURE_PENALTIES = (0.001, 0.01, 0.1)
"""The same of a feature."""
SPEED_INTERCEPT_PENALTY = 1e-6


def fit_edge_speed(summed: State, rotation: Tensor, features: int, parts: int) -> Tensor:
    """β `(1+F+parts,)` float64: 0 where the sites measured nothing, or where it predicts no better than one growth.

    Args:
        summed: the sites' `longitudinal_sums.sums`, added up.
        rotation: principal components of the basis' parts `(K,q)`, at least `parts` of them.
        features: F.
        parts: how many numbers of parts the drift reads; β is 0 for those that are not used.
    """
    speed = torch.zeros(1 + features + parts, dtype=torch.float64)
    if not float(summed["growth_features"][:, 0, 0].sum()) > 0:
        return speed
    best = _same_for_all(summed)
    for used, penalty in _tried(features, parts):
        turned = torch.block_diag(torch.eye(1 + features, dtype=torch.float64), rotation[:used])
        grams = turned @ summed["growth_features"] @ turned.T
        crosses = summed["growth_areas"] @ turned.T
        error = 0.0
        for fold, others in held_back_folds():
            solved = _solved(grams[others].sum(0), crosses[others].sum(0), penalty)
            error += float(solved @ grams[fold] @ solved - 2 * solved @ crosses[fold])
        if error < best:
            best = error
            speed = torch.zeros_like(speed)
            speed[: len(penalty)] = _solved(grams.sum(0), crosses.sum(0), penalty)
    return speed


def _tried(features: int, parts: int) -> Iterator[tuple[int, Tensor]]:
    """Numbers of parts, and the penalties of all rows."""
    for used, part, feature in itertools.product(READ_PARTS, SPEED_PENALTIES, SPEED_FEATURE_PENALTIES):
        if used <= parts or used == READ_PARTS[0]:
            count = min(used, parts)
            rows = [SPEED_INTERCEPT_PENALTY] + [feature] * features + [part] * count
            yield count, torch.tensor(rows, dtype=torch.float64)


def _solved(gram: Tensor, cross: Tensor, penalty: Tensor) -> Tensor:
    scale = gram[0, 0].clamp_min(1e-12)
    return torch.linalg.solve(gram + scale * torch.diag(penalty), cross)


def _same_for_all(summed: State) -> float:
    """Error of the same growth a year for everybody on patients who were held back, less what no growth leaves."""
    years, growth = summed["time_features"][:, 0, 0], summed["growth_years"]
    error = 0.0
    for fold, others in held_back_folds():
        rate = growth[others].sum() / years[others].sum().clamp_min(1e-12)
        error += float(rate.square() * years[fold] - 2 * rate * growth[fold])
    return error
