"""Several processes that train one adapter together, by sums over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ld_common.diffusion.computing import Computing

SUMMED_AT_ONCE = 2**25
"""Numbers of gradients that are summed over processes in one call."""


@dataclass(frozen=True)
class Ranks:
    """The processes that train one adapter together; by default this one alone.

    All of them draw the same random numbers for a whole batch, and each computes the gradient of its share of the rows.
    """

    rank: int = 0
    count: int = 1
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """The sum of a tensor over the processes, the same in each of them."""

    def share(self, rows: int, group: int = 1) -> Tensor:
        """Positions, int64, of the rows of a batch that this process computes: every `count`-th group of rows."""
        return (torch.arange(rows) // group % self.count == self.rank).nonzero()[:, 0]

    def first(self, tensor: Tensor) -> Tensor:
        """The tensor of the first process, in all of them."""
        return self.total(tensor if self.rank == 0 else torch.zeros_like(tensor))

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of several tensors of one dtype, some at once: a copy of all may not fit into memory."""
        if self.count == 1:
            return list(tensors)
        summed: list[Tensor] = []
        while len(summed) < len(tensors):
            ends = accumulate(tensor.numel() for tensor in tensors[len(summed) :])
            together = max(1, sum(end <= SUMMED_AT_ONCE for end in ends))
            several = tensors[len(summed) : len(summed) + together]
            flat = self.total(torch.cat([tensor.flatten() for tensor in several]))
            parts = flat.split([tensor.numel() for tensor in several])
            summed += [part.view_as(tensor) for part, tensor in zip(parts, several, strict=True)]
        return summed


ALONE = Ranks()


@dataclass(frozen=True)
class SharedComputing(Computing):
    """How the network of one of several processes computes."""

    ranks: Ranks = ALONE
    """The processes, each of which calls `optimize` with equal arguments but for its rank."""
