"""Aggregators that are exact for LoRA: what the next round starts from has the mean of the sites' products B·A.

The mean of factors, `mean`, is not: mean(B)·mean(A) differs from mean(B·A) by some tenth of the update. Each of these
mends it in another way; docs/aggregation.md compares their traffic and what they go with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ld_common.adapters.low_rank import rank_of, sum_of_products
from ld_common.core.config import require
from ld_common.core.state import State, Tensors
from ld_server.aggregation import Aggregate, Mean, aggregate_states


@dataclass
class Ffa(Mean):
    """A stays as it was drawn, sites train and send B: the mean of B is the mean of the products (FFA-LoRA, arXiv
    2403.12313). Half the bytes, and under differential privacy noise enters once and not as a product."""

    name: ClassVar[str] = "ffa"
    factors: ClassVar[str] = "b"


@dataclass
class RoLora(Mean):
    """Sites train and send B in odd rounds and A in even ones, the other factor being the same at all sites (RoLoRA,
    arXiv 2502.01755): the mean is exact in each round, with half the bytes to the server."""

    name: ClassVar[str] = "rolora"
    factors: ClassVar[str] = "alternate"


@dataclass
class FedSa(Mean):
    """A is shared by its mean, and each site keeps a B of its own (FedSA-LoRA, arXiv 2410.01463), or the reverse: half
    the bytes to the server. The sites' adapters differ. The release has the mean of the factors of those sites whose
    `policy.release_own_part` lets them leave, and each of them by name (`--site` of `ld-generate`)."""

    name: ClassVar[str] = "fedsa"
    factors: ClassVar[str] = "both"

    keeps: str = "b"
    """The factor that stays at each site: `b` or `a`."""

    def __post_init__(self) -> None:
        require(self.keeps in ("a", "b"), f"federation.aggregation.keeps is '{self.keeps}': use a or b")


@dataclass
class _OfProducts(Mean):
    """Aggregators that need each site's factors."""

    only_mean: ClassVar[bool] = False
    factors: ClassVar[str] = "both"


@dataclass
class FlexLora(_OfProducts):
    """The mean of the products, cut to the adapter's rank by singular values (FlexLoRA, arXiv 2402.11505).

    Exact where the mean has at most that rank, otherwise its best approximation. A site of a smaller rank starts from
    the largest singular values.
    """

    name: ClassVar[str] = "flexlora"
    mixed_ranks: ClassVar[bool] = True

    def combine(
        self, states: Sequence[Tensors], weights: Sequence[float], before: Aggregate, round_number: int
    ) -> Aggregate:
        """Decompose the mean product of each layer, in float64."""
        return replace(before, state=sum_of_products(states, _shares(weights), rank_of(before.state)))


@dataclass
class FedEx(_OfProducts):
    """The means of A and B, and what they miss of the mean product is carried in the base's weights (FedEx-LoRA, arXiv
    2410.09432). The carried factors grow with sites and rounds, up to the layer's own size, and go to each site."""

    name: ClassVar[str] = "fedex"

    def combine(
        self, states: Sequence[Tensors], weights: Sequence[float], before: Aggregate, round_number: int
    ) -> Aggregate:
        """Average the factors, and carry the rest."""
        mean = self.aggregate(states, weights)
        return Aggregate(mean, _carried(before.carried, [*states, mean], [*_shares(weights), -1.0]), before.memory)


@dataclass
class Flora(_OfProducts):
    """The stacked products of all sites are carried in the base's weights, and the adapter starts anew in each round
    (FLoRA, arXiv 2409.05976). Traffic to the sites grows with sites and rounds, up to the layers' own size."""

    name: ClassVar[str] = "flora"
    mixed_ranks: ClassVar[bool] = True

    def combine(
        self, states: Sequence[Tensors], weights: Sequence[float], before: Aggregate, round_number: int
    ) -> Aggregate:
        """Carry what the sites added to the products that they started from, of which the adapter's own is one."""
        shares = _shares(weights)
        started = before.state  # the product of a study's start; of a fresh adapter it is zero
        return Aggregate(started, _carried(before.carried, [*states, started], [*shares, -1.0]), before.memory)


def mean_own_part(own_parts: Mapping[str, State]) -> State:
    """The mean of the factors that sites have of their own, by site; empty without any."""
    return aggregate_states(own_parts, dict.fromkeys(own_parts, 1.0), Mean()) if own_parts else {}


def _shares(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [weight / total for weight in weights]


def _carried(before: State, states: Sequence[Tensors], weights: Sequence[float]) -> State:
    """Factors of what is carried already and a weighted sum of products, of the least rank that holds them."""
    if before:
        states, weights = [before, *states], [1.0, *weights]
    return sum_of_products(states, weights)
