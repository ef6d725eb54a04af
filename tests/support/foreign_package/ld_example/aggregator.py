from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ld_common.core.config import require
from ld_common.core.state import State, Tensors
from ld_server.aggregation import Aggregator


@dataclass
class GeometricMedian(Aggregator):
    """The point of least summed distance to the sites' adapters, by Weiszfeld's iterations from their mean."""

    name: ClassVar[str] = "geometric_median"
    min_sites: ClassVar[int] = 3

    iterations: int = 20

    def __post_init__(self) -> None:
        require(self.iterations > 0, f"federation.aggregation.iterations is {self.iterations}: it must be above 0")

    def aggregate(self, states: Sequence[Tensors], weights: Sequence[float]) -> State:
        """See `Aggregator.aggregate`."""
        keys = sorted(states[0])
        points = torch.stack([torch.cat([state[key].double().flatten() for key in keys]) for state in states])
        shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        median = shares @ points
        for _ in range(self.iterations):
            pull = shares / (points - median).norm(dim=1).clamp(min=1e-9)
            median = (pull / pull.sum()) @ points
        parts = median.split([states[0][key].numel() for key in keys])
        return {key: part.view(states[0][key].shape).float() for key, part in zip(keys, parts, strict=True)}
