"""Histogram matching, sharpness and background level of sets of pictures `(N,1,S,S)` in [-1,1].

A distance between sets may be nothing but brightness. `match_grey_levels` corrects a set's brightness as a whole;
`histogram_match`, applied to both sets, makes a comparison blind to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ld_common.core.errors import RequestError

BATCH = 512


def histogram_match(pictures: Tensor, references: Tensor) -> Tensor:
    """Map each picture's grey levels monotonically onto those of all `references` pooled; returns `(N,1,S,S)`.

    A pixel at quantile q of its picture gets the references' q-quantile; equal pixels share their mean rank and stay
    equal. Match both sets of a comparison: a single reference does not have the pooled grey levels, so matching only
    the generated set would drive the sets apart. With both matched, a distance ignores any monotone change of grey
    levels.
    """
    pixels = pictures[0].numel()
    pooled = references.to(pictures.device).flatten().sort().values
    # mean ranks are multiples of one half, so a table of 2 * pixels - 1 holds every possible quantile
    shares = (torch.arange(2 * pixels - 1, device=pooled.device, dtype=torch.float64) / 2 + 0.5) / pixels
    position = (shares * len(pooled) - 0.5).clamp(0, len(pooled) - 1)
    below = position.floor().long()
    above = (below + 1).clamp_max(len(pooled) - 1)
    table = torch.lerp(pooled[below].double(), pooled[above].double(), position - below).to(pictures.dtype)
    matched = [table[_doubled_ranks(batch.flatten(1))] for batch in pictures.split(BATCH)]
    return torch.cat(matched).view_as(pictures)


def match_grey_levels(pictures: Tensor, references: Tensor) -> Tensor:
    """Apply one monotone map to all pictures `(N,1,S,S)` that gives them the references' pooled histogram.

    This is the usual correction of samples that are too grey: differences between pictures stay.
    """
    source = pictures.flatten().sort().values
    target = references.to(pictures).flatten().sort().values
    # equal pixels share their mean rank
    values = pictures.contiguous()
    rank = (torch.searchsorted(source, values) + torch.searchsorted(source, values, right=True)).double() / 2
    position = (rank / len(source) * len(target) - 0.5).clamp(0, len(target) - 1)
    below = position.floor().long()
    above = (below + 1).clamp_max(len(target) - 1)
    return torch.lerp(target[below].double(), target[above].double(), position - below).to(pictures.dtype)


def _doubled_ranks(values: Tensor) -> Tensor:
    """Twice the rank, from 0, of every value in its row of `(N,P)`; equal values share their mean rank."""
    values = values.contiguous()
    ordered = values.sort(1).values
    first = torch.searchsorted(ordered, values, right=False)
    last = torch.searchsorted(ordered, values, right=True) - 1
    return first + last


def sharpness(pictures: Tensor) -> Tensor:
    """Mean squared gradient over the variance of grey levels by picture `(N,)`, in 1/px^2.

    About 0.01 for a blur, 4 for white noise, 0 for a constant picture; invariant to scaling and shifting grey levels.
    """
    values = pictures.double()
    down = values.diff(dim=2).square().mean((1, 2, 3))
    across = values.diff(dim=3).square().mean((1, 2, 3))
    variance = values.var((1, 2, 3), correction=0)
    return torch.where(variance > 0, (down + across) / variance.clamp_min(1e-300), 0.0).float()


def background_mask(references: Tensor, share: float = 0.25) -> Tensor:
    """The pixels, bool `(S,S)`, where `references` `(N,1,S,S)` vary least between pictures: at least `share` of all.

    This is the border of a brain slice, and the least variable part of a radiograph. Ties are all included, so an
    exactly black border counts whole.
    """
    deviation = references.double().std(0)[0]
    limit = deviation.flatten().kthvalue(max(1, round(share * deviation.numel()))).values
    return deviation <= limit


def background_error(pictures: Tensor, references: Tensor, mask: Tensor) -> Tensor:
    """Mean grey level of each picture `(N,)` on `mask` `(S,S)` minus that of the references, in [-2,2].

    A mean above 0 means that the generated background is too bright.
    """
    return pictures[:, 0, mask].mean(1) - references[:, 0, mask].mean()


@dataclass(frozen=True, eq=False)
class ConditionRegression:
    """What the condition alone says about a structure's size, by ordinary least squares on real scans."""

    coefficients: Tensor
    """float64 `(K+1,)`: the intercept, then one for every column of the design."""
    prediction: Tensor
    """float64 `(N,)`: the fitted sizes of the scans themselves, in the sizes' unit."""

    def predict(self, design: Tensor) -> Tensor:
        """Sizes `(M,)` that the conditions `design` `(M,K)` let expect."""
        return _with_intercept(design) @ self.coefficients


def condition_regression(sizes: Tensor, design: Tensor) -> ConditionRegression:
    """Regress measured sizes `(N,)` of real scans on their conditions `design` `(N,K)`, which has no intercept.

    Of columns that say the same, any split of the coefficients predicts the same: the smallest one is taken.
    """
    matrix = _with_intercept(design)
    solution = torch.linalg.lstsq(matrix, sizes.double().cpu()[:, None], driver="gelsd").solution[:, 0]
    return ConditionRegression(solution, matrix @ solution)


def _with_intercept(design: Tensor) -> Tensor:
    return torch.cat([torch.ones(len(design), 1, dtype=torch.float64), design.double().cpu()], 1)


def size_slope(sizes: Tensor, predicted: Tensor) -> float:
    """Least-squares slope, with intercept, of sizes `(N,)` measured on pictures on the sizes `(N,)` predicted.

    The prediction is that of a regression on real scans: those have the slope 1 against their own, pictures that
    ignore their condition 0, pictures that exaggerate it above 1.

    Raises:
        RequestError: all predictions are the same, so no slope can be seen.
    """
    x, y = predicted.double().cpu(), sizes.double().cpu()
    deviation = x - x.mean()
    if float(deviation.square().sum()) <= 1e-18 * float(x.square().sum()):
        raise RequestError("all pictures have the same condition, so no slope can be seen: vary the conditions")
    return float((deviation * (y - y.mean())).sum() / deviation.square().sum())
