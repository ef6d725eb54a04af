"""The mean that is summed as replies come is the mean of all of them, in any order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from ld_common.core.config import from_mapping
from ld_common.core.state import State, Tensors
from ld_common.protocol.study_config import FederationConfig
from ld_server import stored_states
from ld_server.aggregation import Mean, Median, clip_update
from ld_server.running_mean import LEAST_BITS, RunningMean, running_mean
from ld_server.stored_states import FlatReference
from tests.server.test_stored_states import in_memory, some_state


def equal(**federation: Any) -> FederationConfig:
    return from_mapping(FederationConfig, {"sites": ["p", "q", "r"], **federation})


def mean_of(states: list[Any], reference: State, bits: int = 44) -> State:
    running = RunningMean(FlatReference(reference), bits)
    for state in states:
        running.add(state)
    return running.mean()


def spread_states(count: int) -> list[State]:
    """States whose numbers differ by twelve orders of magnitude, where the order of a float64 sum shows."""
    return [{name: value * 10.0 ** (4 * (n % 4) - 12) for name, value in some_state(n).items()} for n in range(count)]


def test_the_order_of_arrival_and_the_form_of_a_state_change_no_bit() -> None:
    states, reference = spread_states(5), some_state(9)
    expected = mean_of(states, reference)
    for order in itertools.permutations(states):
        found = mean_of([in_memory(state) if n % 2 else state for n, state in enumerate(order)], reference)
        assert list(found) == list(expected)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_it_is_the_mean_within_its_rounding_and_to_the_bit_where_numbers_have_fewer_places() -> None:
    for states in ([some_state(n) for n in range(7)], spread_states(7)):
        found, plain = mean_of(states, states[0]), Mean().aggregate(states, [1.0] * 7)
        for name, value in plain.items():
            assert (found[name].dtype, found[name].shape) == (torch.float32, value.shape)
            torch.testing.assert_close(found[name], value, atol=2.0**-44, rtol=2.0**-23)  # ties
    same = {"w": torch.tensor([0.1, -3e-6])}
    assert torch.equal(mean_of([same] * 3, same)["w"], same["w"])


def test_the_largest_numbers_that_are_accepted_do_not_overflow() -> None:
    federation, reference = equal(max_update_norm=1000.0), {"w": torch.full((3,), -23.0)}
    flat = FlatReference(reference)
    assert running_mean(flat, federation, Mean()) is not None
    for edge in (-1023.0, 1023.0):
        running = running_mean(flat, federation, Mean())
        assert running is not None
        for _ in range(4096):
            running.add({"w": torch.full((3,), edge)})
        assert running.mean()["w"].tolist() == [edge] * 3


def test_a_clipped_state_counts_as_clipped() -> None:
    state, reference = some_state(0), some_state(1)
    clipped = clip_update(in_memory(state), reference, 1.0, 300.0)
    found, plain = mean_of([clipped, state], reference), Mean().aggregate([clipped, state], [1.0, 1.0])
    assert all(torch.equal(value, plain[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("federation", "aggregator"),
    [
        (equal(weighting="num_examples"), Mean()),
        (equal(min_train_nodes=3), Median()),
        (equal(max_update_norm=1e4), Mean()),
        (equal(max_update_norm=float("inf")), Mean()),
        (equal(sites=[f"s{number}" for number in range(4097)]), Mean()),
    ],
)
def test_what_needs_all_states_at_once_or_more_places_is_not_summed_as_it_comes(
    federation: FederationConfig, aggregator: Any
) -> None:
    flat = FlatReference(some_state(0))
    assert running_mean(flat, federation, aggregator) is None
    assert running_mean(flat, equal(), Mean()) is not None


def test_another_packages_mean_is_not_taken_for_ours() -> None:
    class Shifted(Mean):
        def aggregate(self, states: Sequence[Tensors], weights: Sequence[float]) -> State:
            return {name: value + 1 for name, value in super().aggregate(states, weights).items()}

    assert running_mean(FlatReference(some_state(0)), equal(), Shifted()) is None


def test_large_and_empty_states_are_not_summed_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    assert running_mean(FlatReference({}), equal(), Mean()) is None
    monkeypatch.setattr(stored_states, "FLAT_BYTES", 1000)
    assert running_mean(FlatReference(some_state(0)), equal(), Mean()) is None


def test_the_rounding_is_far_below_that_of_float32() -> None:
    assert np.finfo(np.float32).eps * 1e-5 > 2.0**-LEAST_BITS
