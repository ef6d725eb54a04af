"""Aggregators of LoRA against the dense mean of the products, and optimisers of the server against Flower's own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvgM, FedYogi
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from ld_common.adapters.low_rank import (
    cut_rank,
    dense_update,
    down_names,
    product_norm,
    rank_of,
    sum_of_products,
)
from ld_common.core.config import from_mapping
from ld_common.core.errors import AdapterError, ConfigError
from ld_common.core.state import State
from ld_common.protocol.study_config import FederationConfig, StudyConfig
from ld_server.aggregation import Aggregate, Aggregator, Mean, check_aggregation, combine_states, read_aggregator

LAYERS = {"unet.a.to_k": (24, 16), "unet.b.proj": (20, 12, 1, 1), "unet.c.conv": (10, 8, 3, 3)}
"""Shapes of the base's weights."""
EXACT = 1e-6
STATELESS = ("mean", "ffa", "rolora", "flexlora", "fedex", "flora")


def lora_state(seed: int, rank: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, (out, *into) in LAYERS.items():
        ones = [1] * (len(into) - 1)
        state[f"{name}.lora_A.weight"] = torch.randn(rank, *into, generator=generator)
        state[f"{name}.lora_B.weight"] = torch.randn(out, rank, *ones, generator=generator) * 10.0 ** (seed % 3 - 1)
    return dict(sorted(state.items()))


def dense(*states: State) -> dict[str, Tensor]:
    """The sum of the products, as the layers' updates in float64."""
    return {
        name: sum((dense_update(state, name) for state in states if state), torch.zeros(1).double())
        for name in down_names(states[0])
    }


def dense_mean(states: dict[str, State], weights: dict[str, float]) -> dict[str, Tensor]:
    total = sum(weights.values())
    parts = {site: dense(state) for site, state in states.items()}
    names = next(iter(parts.values()))
    return {
        name: sum((weights[site] / total * parts[site][name] for site in states), torch.zeros(1).double())
        for name in names
    }


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative L2 error of a layer."""
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


def aggregator(name: str, **options: object) -> Aggregator:
    federation = {"sites": ["a", "b", "c"], "aggregation": {"name": name, **options}}
    return read_aggregator(from_mapping(FederationConfig, federation))


def sites(rank: int = 3, count: int = 3, ranks: tuple[int, ...] = ()) -> dict[str, State]:
    return {f"s{number}": lora_state(number, ranks[number] if ranks else rank) for number in range(count)}


WEIGHTS = {"s0": 1.0, "s1": 2.0, "s2": 4.0}
FRESH = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in lora_state(9, 3).items()}


def test_factors_give_the_update_of_peft() -> None:
    first, second = torch.nn.Conv2d(8, 3, 3, bias=False), torch.nn.Conv2d(3, 10, 1, bias=False)
    state = {"x.lora_A.weight": first.weight.detach(), "x.lora_B.weight": second.weight.detach()}
    image = torch.randn(1, 8, 5, 5)
    update = torch.nn.functional.conv2d(image, dense_update(state, "x.lora_A.weight").float())
    torch.testing.assert_close(update, second(first(image)).detach())


def test_a_sum_of_products_is_exact_at_its_own_rank_and_the_best_below() -> None:
    states = list(sites().values())
    expected = dense_mean(sites(), WEIGHTS)
    shares = [weight / 7 for weight in WEIGHTS.values()]
    whole = sum_of_products(states, shares)
    assert rank_of(whole) == 9
    assert error(dense(whole), expected) < EXACT
    cut = sum_of_products(states, shares, 4)
    for name, product in dense(cut).items():
        values = torch.linalg.svdvals(expected[name].flatten(1))
        missed = (product - expected[name]).norm() ** 2
        torch.testing.assert_close(missed, values[4:].square().sum(), rtol=1e-5, atol=1e-9)
    assert product_norm(whole) == pytest.approx(
        sum(float(value.square().sum()) for value in expected.values()) ** 0.5, rel=1e-6
    )


def test_a_larger_rank_is_padded_with_zeros() -> None:
    state = lora_state(0, 2)
    padded = sum_of_products([state], [1.0], 7)
    assert rank_of(padded) == 7
    assert error(dense(padded), dense(state)) < EXACT
    nothing = {name: torch.zeros_like(value) for name, value in state.items()}
    assert rank_of(sum_of_products([nothing], [1.0])) == 1
    with pytest.raises(AdapterError, match="only LoRA states"):
        sum_of_products([{"w": torch.ones(2)}], [1.0])


@pytest.mark.parametrize("rank", [3, 9])
def test_flexlora_is_the_mean_product_at_full_rank(rank: int) -> None:
    before = Aggregate(lora_state(8, rank))
    after = combine_states(sites(), WEIGHTS, aggregator("flexlora"), before, 1)
    assert {name: value.shape for name, value in after.state.items()} == {
        name: value.shape for name, value in before.state.items()
    }
    missed = error(dense(after.state), dense_mean(sites(), WEIGHTS))
    assert missed < EXACT if rank == 9 else missed > 0.01
    assert not after.carried


@pytest.mark.parametrize("name", ["fedex", "flora"])
def test_what_is_carried_and_the_adapter_are_the_mean_product_over_rounds(name: str) -> None:
    before, expected = Aggregate(FRESH), None
    for number in (1, 2):
        states = {
            site: {key: value + number * state[key] for key, value in before.state.items()}
            for site, state in sites().items()
        }
        carried = before.carried
        expected = dense_mean(states, WEIGHTS)
        if carried:
            expected = {key: expected[key] + product for key, product in dense(carried).items()}
        started = before.state
        before = combine_states(states, WEIGHTS, aggregator(name), before, number)
        assert error(dense(before.state, before.carried), expected) < EXACT
        if name == "flora":
            assert all(torch.equal(value, started[key]) for key, value in before.state.items())
        else:
            mean = Mean().aggregate([states[site] for site in sorted(states)], [1.0, 2.0, 4.0])
            assert all(torch.equal(value, mean[key]) for key, value in before.state.items())


def test_ffa_and_rolora_average_exactly_and_the_mean_of_both_factors_does_not() -> None:
    shared = lora_state(9, 3)
    for factor in ("lora_B", "lora_A"):
        sent = {site: {key: value for key, value in state.items() if factor in key} for site, state in sites().items()}
        name = "ffa" if factor == "lora_B" else "rolora"
        after = combine_states(sent, WEIGHTS, aggregator(name), Aggregate({}), 1).state
        whole = {site: {**shared, **state} for site, state in sent.items()}
        assert error(dense({**shared, **after}), dense_mean(whole, WEIGHTS)) < EXACT
    after = combine_states(sites(), WEIGHTS, aggregator("mean"), Aggregate({}), 1).state
    assert error(dense(after), dense_mean(sites(), WEIGHTS)) > 0.1


@pytest.mark.parametrize("name", ["flexlora", "flora"])
def test_sites_of_different_ranks_are_combined(name: str) -> None:
    states = sites(ranks=(1, 2, 3))
    after = combine_states(states, WEIGHTS, aggregator(name), Aggregate({**FRESH}), 1)
    if name == "flora":
        assert error(dense(after.state, after.carried), dense_mean(states, WEIGHTS)) < EXACT
        return
    full = combine_states(states, WEIGHTS, aggregator(name), Aggregate(lora_state(8, 6)), 1)
    assert error(dense(full.state), dense_mean(states, WEIGHTS)) < EXACT
    cut = cut_rank(after.state, 1)  # what the site of rank 1 starts from
    for key, product in dense(cut).items():
        left, values, right = torch.linalg.svd(dense_mean(states, WEIGHTS)[key].flatten(1))
        torch.testing.assert_close(product.flatten(1), values[0] * left[:, :1] @ right[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STATELESS)
def test_no_aggregator_of_lora_depends_on_the_order_of_sites(name: str) -> None:
    states, rule = sites(), aggregator(name)
    first = combine_states(states, WEIGHTS, rule, Aggregate(FRESH), 1)
    for order in itertools.permutations(states):
        turned = {site: states[site] for site in order}
        other = combine_states(turned, WEIGHTS, rule, Aggregate(FRESH), 1)
        assert all(torch.equal(value, other.state[key]) for key, value in first.state.items())
        assert all(torch.equal(value, other.carried[key]) for key, value in first.carried.items())


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", STATELESS)
def test_one_site_and_equal_sites_give_that_site(name: str, count: int) -> None:
    state = lora_state(4, 3)
    states = {f"s{number}": state for number in range(count)}
    after = combine_states(states, dict.fromkeys(states, 1.0), aggregator(name), Aggregate(FRESH), 1)
    parts = [part for part in (after.state, after.carried) if part]
    assert error(dense(*parts), dense(state)) < EXACT


@pytest.mark.parametrize(
    ("name", "options", "flower"),
    [
        ("fedadam", {"eta": 0.05, "tau": 0.01}, FedAdam(eta=0.05, tau=0.01)),
        ("fedyogi", {"eta": 0.05, "beta_1": 0.5}, FedYogi(eta=0.05, beta_1=0.5)),
        (
            "fedavgm",
            {"server_momentum": 0.7, "server_learning_rate": 0.5},
            FedAvgM(server_momentum=0.7, server_learning_rate=0.5),
        ),
    ],
)
def test_rounds_of_an_optimiser_are_those_of_flowers_strategy_that_runs_on(
    name: str, options: dict[str, object], flower: FedAvgM | FedAdam | FedYogi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours is made anew in each round and gets its memory back, as after a crash; Flower's keeps its own."""
    for identity in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, identity, 1)
    rule, before = aggregator(name, **options), Aggregate(lora_state(9, 2))
    for number in (1, 2, 3):
        states = {
            f"s{site}": {key: value + 0.1 * lora_state(site + number, 2)[key] for key, value in before.state.items()}
            for site in range(3)
        }
        if isinstance(flower, FedAvgM):
            flower.current_arrays = flower.current_arrays or ArrayRecord(dict(before.state))
        else:
            flower.current_arrays = {key: value.numpy() for key, value in before.state.items()}
        replies = [
            Message(
                RecordDict({"arrays": ArrayRecord(dict(state)), "metrics": MetricRecord({"num-examples": 1})}),
                dst_node_id=1,
                message_type="train",
            )
            for state in states.values()
        ]
        stepped, _ = flower.aggregate_train(number, replies)
        assert stepped is not None
        before = combine_states(states, dict.fromkeys(states, 1.0), rule, before, number)
        for key, value in stepped.to_torch_state_dict().items():
            np.testing.assert_allclose(before.state[key].numpy(), value.float().numpy(), rtol=2e-5, atol=1e-6)
    assert before.memory


def test_without_momentum_fedavgm_is_the_mean() -> None:
    states = sites()
    rule = aggregator("fedavgm", server_momentum=0.0)
    after = combine_states(states, WEIGHTS, rule, Aggregate(lora_state(9, 3)), 1)
    mean = Mean().aggregate(list(states.values()), list(WEIGHTS.values()))
    for key, value in mean.items():
        torch.testing.assert_close(after.state[key], value)


def study(name: str, adapter: dict[str, object] | None = None, **sections: object) -> StudyConfig:
    federation = {"sites": ["a", "b", "c"], "aggregation": {"name": name}, "min_train_nodes": 3}
    federation |= sections.pop("federation", {})  # type: ignore[arg-type]
    values = {"federation": federation, "adapter": {"name": "lora", "rank": 4, **(adapter or {})}, **sections}
    return from_mapping(StudyConfig, values)


PRIVATE = {"privacy": {"enabled": True}, "drift": {"shape": "none"}}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: study("flexlora", federation={"secure_aggregation": True}), "only their sum"),
        (lambda: study("median", federation={"secure_aggregation": True}), "only their sum"),
        (lambda: study("mean", federation={"ranks": {"a": 2}}), "cannot combine federation.ranks"),
        (lambda: study("fedex", federation={"ranks": {"a": 2}}), "cannot combine federation.ranks"),
        (lambda: study("flora", federation={"ranks": {"a": 5}}), "at most adapter.rank, 4"),
        (lambda: study("flora", federation={"ranks": {"d": 2}}), "not one of federation.sites"),
        (lambda: study("flora", {"name": "lora"}, start="x", federation={"ranks": {"a": 2}}), "leave out one"),
        (lambda: study("flexlora", {"freeze_a": True}), "set adapter.freeze_a to false"),
        (lambda: study("fedex", **PRIVATE), "default under differential privacy"),
        (lambda: study("ffa", {"freeze_a": False}), "trains B alone"),
        (lambda: study("rolora", federation={"wire": "int8"}), "the other factor"),
        (lambda: study("fedsa", {"freeze_a": True}), "trains both factors"),
        (lambda: study("fedsa", federation={"ranks": {"a": 2}}), "cannot combine federation.ranks"),
        (lambda: study("fedsa", federation={"aggregation": {"name": "fedsa", "keeps": "c"}}), "use a or b"),
    ],
)
def test_an_impossible_pair_is_refused_with_its_reason(make: object, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_aggregation(make())  # type: ignore[operator]


@pytest.mark.parametrize("name", ["mean", "fedavgm", "fedadam", "fedyogi", "ffa", "rolora", "fedsa"])
def test_aggregators_of_means_go_with_secure_sums(name: str) -> None:
    assert check_aggregation(study(name, federation={"secure_aggregation": True})).only_mean


def test_full_fine_tuning_is_refused_by_aggregators_of_factors() -> None:
    values = {"federation": {"sites": ["a", "b"], "aggregation": {"name": "flexlora"}}, "adapter": {"name": "full"}}
    with pytest.raises(ConfigError, match="LoRA's factors"):
        check_aggregation(from_mapping(StudyConfig, values))


def test_ffa_freezes_a_and_rolora_takes_turns() -> None:
    assert study("ffa").adapter["freeze_a"] is True
    turns = study("rolora")
    trained = {number: [turns.trains(f"x.lora_{factor}.weight", number) for factor in "AB"] for number in (1, 2, 3)}
    assert trained == {1: [False, True], 2: [True, False], 3: [False, True]}
    assert study("mean").trains("x.lora_A.weight", 1)
