"""The mean of a round's states, summed as they come: the server's memory and disk do not grow with the sites."""

from __future__ import annotations

import math

import numpy as np
import torch

from ld_common.adapters.state_dict import BLOCK
from ld_common.core.state import State, Tensors
from ld_common.protocol.study_config import FederationConfig
from ld_server.aggregation import Aggregator, uses_only_mean
from ld_server.stored_states import FlatReference

LEAST_BITS = 40
"""Binary places below which numbers are not rounded; float32 has 44 at 2**-20."""
MOST_STATES = 2**12
MANTISSA = 52


class RunningMean:
    """The equal mean of states, which are added in any order to the same bits.

    Each number is rounded to a multiple of `2**-bits`, 44 binary places with the default `federation.max_update_norm`,
    and the multiples are summed as integers, whose sum does not depend on the order.
    """

    def __init__(self, flat: FlatReference, bits: int) -> None:
        """Start with no state.

        Args:
            flat: a state of the same names and shapes.
            bits: binary places of the numbers, each of which is below `2**(51 - bits)`.
        """
        self._flat, self._bits = flat, bits
        # near 1.5 * 2**52 multiples, float64 has steps of one multiple: adding that many rounds a number to multiples,
        # and the bits of the result, read as an integer, grow by one with each of them
        self._shift = np.array([1.5 * 2.0 ** (MANTISSA - bits)])
        self._sums = np.zeros(flat.count, np.int64)
        self._states = 0

    def add(self, state: Tensors) -> None:
        """Add a checked state."""
        numbers, block = self._flat.numbers(state), np.empty(BLOCK)
        for start in range(0, numbers.size, BLOCK):
            sums = self._sums[start : start + BLOCK]
            shifted = block[: sums.size]
            shifted[:] = numbers[start : start + BLOCK]
            shifted += self._shift
            sums += shifted.view(np.int64)
        self._states += 1

    def mean(self) -> State:
        """The float32 mean of the states added; at least one was."""
        multiples = self._sums - self._states * self._shift.view(np.int64)  # both modulo 2**64, the difference is small
        mean = multiples * 2.0**-self._bits / self._states
        return self._flat.state(torch.from_numpy(mean.astype(np.float32)))


def running_mean(flat: FlatReference, federation: FederationConfig, aggregator: Aggregator) -> RunningMean | None:
    """A round's running mean; None where it needs all states at once.

    That is for another aggregator or weights that depend on all sites, for states that `FlatReference` does not take,
    and where a large `federation.max_update_norm` would leave less than `LEAST_BITS`.
    """
    if not uses_only_mean(aggregator) or federation.weighting != "equal" or len(federation.sites) > MOST_STATES:
        return None
    largest = flat.largest + federation.max_update_norm
    if not flat.count or not math.isfinite(largest):
        return None
    bits = MANTISSA - 1 - max(0, math.ceil(math.log2(largest)) + 1)
    return RunningMean(flat, bits) if bits >= LEAST_BITS else None
