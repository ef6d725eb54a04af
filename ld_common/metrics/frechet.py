"""Fréchet and kernel distances between two sets of features."""

from __future__ import annotations

import torch
from torch import Tensor

from ld_common.core.errors import RequestError

KERNEL_ROWS = 1024
"""Rows of a kernel matrix held in memory at once."""


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features `(N,D)` and `(M,D)`.

    FID is this distance of Inception features (arXiv 1706.08500, eq. 6). It is biased upwards by about 1/N, and more if
    N is not much larger than D: compare only distances of equally many pictures.
    """
    a, b = _double(features_a), _double(features_b)
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    # tr (S_a S_b)^(1/2) is the sum of the singular values of R_a R_b', which avoids the root of an indefinite matrix
    overlap = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * overlap
    return max(float(distance), 0.0)


def _covariance_root(features: Tensor) -> Tensor:
    """A matrix R `(R,D)`, R at most D, with R'R the covariance of `features`."""
    count, width = features.shape
    centred = (features - features.mean(0)) / (count - 1) ** 0.5
    if count <= width:
        return centred
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def kernel_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Unbiased squared MMD of features `(N,D)` and `(M,D)` under the kernel (x.y/D + 1)^3; N and M may differ.

    KID is this distance of Inception features (arXiv 1801.01401, eq. 4). Two sets of one distribution give 0 on
    average, so a single value may be negative.
    """
    a, b = _double(features_a), _double(features_b)
    within_a = (_kernel_sum(a, a) - _kernel(a, a, paired=True).sum()) / (len(a) * (len(a) - 1))
    within_b = (_kernel_sum(b, b) - _kernel(b, b, paired=True).sum()) / (len(b) * (len(b) - 1))
    return float(within_a + within_b - 2 * _kernel_sum(a, b) / (len(a) * len(b)))


def _kernel(a: Tensor, b: Tensor, paired: bool = False) -> Tensor:
    """The kernel of all pairs `(N,M)`, or of equal rows `(N,)`."""
    products = (a * b).sum(1) if paired else a @ b.T
    return (products / a.shape[1] + 1) ** 3


def _kernel_sum(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([_kernel(rows, b).sum() for rows in a.split(KERNEL_ROWS)]).sum()


def _double(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise RequestError(f"features have shape {tuple(features.shape)}: give two rows or more, one for each picture")
    return features.double()
