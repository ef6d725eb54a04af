"""Low-rank factors of LoRA states: products, exact sums of products, and their best approximation of a rank.

A layer's update is `B A`, with A `(r,in)` or `(r,in,h,w)` and B `(out,r)` or `(out,r,1,1)`. A sum of products is
itself one product of stacked factors, so no dense `(out,in)` matrix is ever formed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ld_common.core.errors import AdapterError
from ld_common.core.state import State, Tensors

DOWN, UP = ".lora_A.", ".lora_B."
NEGLIGIBLE = 1e-8
"""Singular values below this share of the largest carry nothing in float32."""


def down_names(names: Iterable[str]) -> list[str]:
    """The names of A among those of a state, sorted; `up_name` gives B's."""
    return sorted(name for name in names if DOWN in name)


def up_name(down: str) -> str:
    """The name of the B that belongs to an A."""
    return down.replace(DOWN, UP)


def is_lora(state: Tensors) -> bool:
    """Whether every tensor of a state is a factor of a pair."""
    downs = down_names(state)
    return bool(downs) and set(state) == {*downs, *map(up_name, downs)}


def rank_of(state: Tensors) -> int:
    """The largest rank of a state's pairs; 0 for a state without any."""
    return max((len(state[name]) for name in down_names(state)), default=0)


def dense_update(state: Tensors, down: str) -> Tensor:
    """One layer's update B A in float64, `(out,in)` or `(out,in,h,w)`; for small layers and tests."""
    first, second = state[down], state[up_name(down)]
    product = second.double().flatten(1) @ first.double().flatten(1)
    return product.view(len(second), *first.shape[1:])


def cut_rank(state: Tensors, rank: int) -> State:
    """The first `rank` rows of each A and columns of each B."""
    return {name: (value[:, :rank] if UP in name else value[:rank]).clone() for name, value in state.items()}


def sum_of_products(states: Sequence[Tensors], weights: Sequence[float], rank: int | None = None) -> State:
    """Factors of the weighted sum of the states' products, of the least rank or the best of `rank`.

    Orthogonal factors of the stacked B and A leave a small core, whose singular value decomposition is the sum's (as in
    FlexLoRA, arXiv 2402.11505). The rows of each A are orthonormal, the singular values are in B.

    Args:
        states: LoRA states of the same layers; their ranks may differ.
        weights: one a state, of any sign.
        rank: of the result, padded with zeros; None for the rank that the largest layer needs, at least 1.

    Returns:
        Float32 factors, computed in float64.

    Raises:
        AdapterError: a tensor is not of such a pair.
    """
    for state in states:
        if not is_lora(state):
            raise AdapterError("only LoRA states, with A and B, can be multiplied")
    parts = {name: _decompose(states, weights, name) for name in down_names(states[0])}
    if rank is None:
        rank = max(1, *(_needed(values) for _, values, _ in parts.values()))
    summed: State = {}
    for name, (left, values, right) in parts.items():
        kept = min(rank, len(values))
        up = torch.zeros(len(left), rank, dtype=torch.float64)
        down = torch.zeros(rank, right.shape[1], dtype=torch.float64)
        up[:, :kept] = left[:, :kept] * values[:kept]
        down[:kept] = right[:kept]
        first, second = states[0][name], states[0][up_name(name)]
        summed[name] = down.float().view(rank, *first.shape[1:])
        summed[up_name(name)] = up.float().view(len(second), rank, *second.shape[2:])
    return dict(sorted(summed.items()))


def product_norm(state: Tensors) -> float:
    """L2 norm of all products B A together, without forming them."""
    square = 0.0
    for name in down_names(state):
        up, down = state[up_name(name)].double().flatten(1), state[name].double().flatten(1)
        square += float(((up.T @ up) * (down @ down.T)).sum())
    return max(0.0, square) ** 0.5


def _decompose(states: Sequence[Tensors], weights: Sequence[float], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors `(out,k)`, singular values `(k,)` and right vectors `(k,in)` of a layer's weighted sum."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for state, weight in zip(states, weights, strict=True):
        pairs.append((weight * state[up_name(name)].double().flatten(1), state[name].double().flatten(1)))
    left, left_core = torch.linalg.qr(torch.cat([up for up, _ in pairs], 1))
    right, right_core = torch.linalg.qr(torch.cat([down for _, down in pairs], 0).T)
    inner_left, values, inner_right = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    first, second = left @ inner_left, inner_right @ right.T
    # the signs that the decomposition leaves open, so that equal states give equal factors
    largest = second.gather(1, second.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).double()
    return first * signs.T, values, second * signs


def _needed(values: Tensor) -> int:
    return int((values > NEGLIGIBLE * values.max()).sum()) if len(values) and float(values.max()) > 0 else 0
