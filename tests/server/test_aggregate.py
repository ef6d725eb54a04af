from __future__ import annotations

import itertools
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ld_common.adapters.state_dict import update_norm
from ld_common.core.config import from_mapping
from ld_common.core.errors import AdapterError, CheckpointError, ConfigError
from ld_common.core.state import State
from ld_common.protocol.messages import TrainNumbers, TrainResult
from ld_common.protocol.study_config import FederationConfig
from ld_server.aggregation import (
    Aggregator,
    Mean,
    aggregate_drifts,
    aggregate_states,
    check_result,
    clip_update,
    read_aggregator,
    site_weights,
)
from ld_server.checkpoint import NAME, Checkpoint, read_checkpoint, write_checkpoint
from ld_server.drift_collection import CollectedDrifts
from ld_server.drift_form import DriftForm

REFERENCE = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
FORM = DriftForm(torch.Size((4, 1, 1)), torch.float32, 20.0)
GOOD = TrainResult(
    site="x",
    round=1,
    state={"a": torch.ones(3), "b": torch.ones(2, 2)},
    drift=torch.zeros(4, 1, 1),
    numbers=TrainNumbers(visits=10, patients=4, loss_first=1.0, loss_last=0.5, seconds=2.0),
)


def test_the_average_does_not_depend_on_the_order_of_arrival() -> None:
    generator = torch.Generator().manual_seed(0)
    states = {
        name: {"w": torch.randn(50, generator=generator) * 10.0**power}
        for name, power in zip("pqr", (-6, 0, 6), strict=True)
    }
    weights = {"p": 3.0, "q": 7.0, "r": 1.0}
    averages = [
        aggregate_states({name: states[name] for name in order}, {name: weights[name] for name in order}, Mean())["w"]
        for order in itertools.permutations("pqr")
    ]
    assert all(torch.equal(averages[0], other) for other in averages)


def test_the_average_is_weighted_and_exact_in_double_precision() -> None:
    states = {"p": {"w": torch.tensor([0.0])}, "q": {"w": torch.tensor([4.0])}}
    assert aggregate_states(states, {"p": 1.0, "q": 3.0}, Mean())["w"].item() == 3.0
    one = {"w": torch.tensor([0.1])}
    same = aggregate_states({"p": one, "q": one, "r": one}, {"p": 1, "q": 1, "r": 1}, Mean())
    assert torch.equal(same["w"], one["w"])


def rule(name: str, sites: int, beta: float | None = None, **settings: object) -> Aggregator:
    names = [f"s{number}" for number in range(sites)]
    options = {"name": name} if beta is None else {"name": name, "beta": beta}
    values = {"sites": names, "aggregation": options, "weighting": "equal", "min_train_nodes": 3, **settings}
    return read_aggregator(from_mapping(FederationConfig, values))


def sites_states(count: int, seed: int = 0) -> dict[str, State]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"s{number}": {"a": torch.randn(40, generator=generator), "b": torch.randn(3, 5, generator=generator)}
        for number in range(count)
    }


def equal_weights(states: dict[str, State]) -> dict[str, float]:
    return dict.fromkeys(states, 1.0)


@pytest.mark.parametrize("name", ["mean", "median", "trimmed_mean"])
@pytest.mark.parametrize("count", [3, 4])
def test_no_rule_depends_on_the_order_of_sites(name: str, count: int) -> None:
    states, aggregator = sites_states(count), rule(name, count)
    drifts = {site: state["b"] for site, state in states.items()}
    found = aggregate_states(states, equal_weights(states), aggregator)
    for order in itertools.permutations(states):
        turned = {site: states[site] for site in order}
        other = aggregate_states(turned, equal_weights(states), aggregator)
        drift = aggregate_drifts({site: drifts[site] for site in order}, equal_weights(states), aggregator)
        assert all(torch.equal(value, other[key]) for key, value in found.items())
        assert drift is not None
        assert torch.equal(drift, found["b"]) or name == "mean"  # the two means round apart


def test_the_mean_is_the_weighted_average_to_the_bit() -> None:
    states, weights = sites_states(4), {"s0": 3.0, "s1": 7.0, "s2": 1.0, "s3": 2.0}
    mean = aggregate_states(states, weights, rule("mean", 4, weighting="num_examples"))
    for key, value in mean.items():
        total = torch.zeros_like(value, dtype=torch.float64)
        for name in sorted(states):
            total += states[name][key].double() * (weights[name] / 13.0)
        assert torch.equal(value, total.float())


@pytest.mark.parametrize(
    ("visits", "settings", "expected"),
    [
        ({"p": 10, "q": 20, "r": 10**15}, {}, [1, 1, 1]),
        ({"p": 10, "q": 20, "r": 40}, {"weighting": "num_examples"}, [10, 20, 40]),
        ({"p": 10, "q": 20, "r": 10**15}, {"weighting": "num_examples"}, [10, 20, 200]),
        ({"p": 10, "q": 20, "r": 10**15}, {"weighting": "num_examples", "max_weight_ratio": 1.5}, [10, 20, 30]),
        ({"p": 10**15, "q": 10**15, "r": 5}, {"weighting": "num_examples"}, [10**15, 10**15, 5]),  # a majority lies
        ({"p": 10, "q": None, "r": 5}, {"weighting": "num_examples"}, [1, 1, 1]),
    ],
)
def test_a_false_count_does_not_own_the_mean(
    visits: dict[str, int | None], settings: dict[str, object], expected: list[float]
) -> None:
    federation = from_mapping(FederationConfig, {"sites": list(visits), **settings})
    assert list(site_weights(visits, federation).values()) == expected


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_the_median_is_the_middle_or_the_mean_of_the_middle_two(count: int) -> None:
    states = sites_states(count)
    found = aggregate_states(states, equal_weights(states), rule("median", count))
    for key, value in found.items():
        stacked = np.stack([state[key].numpy() for state in states.values()]).astype(np.float64)
        assert np.array_equal(value.numpy(), np.median(stacked, axis=0).astype(np.float32))


@pytest.mark.parametrize(
    ("count", "share", "cut"), [(5, 0.2, 1), (6, 0.2, 2), (30, 0.1, 3), (4, 0.49, 1), (3, 0.01, 1)]
)
def test_the_trimmed_mean_leaves_its_share_out_at_each_end(count: int, share: float, cut: int) -> None:
    states = sites_states(count)
    found = aggregate_states(states, equal_weights(states), rule("trimmed_mean", count, beta=share))
    for key, value in found.items():
        stacked = np.stack([state[key].numpy() for state in states.values()]).astype(np.float64)
        expected = np.sort(stacked, axis=0)[cut : count - cut].mean(0)
        assert np.allclose(value.numpy(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "count", "liars"),
    [
        *(("median", count, liars) for count, liars in ((3, 1), (4, 1), (7, 3), (8, 3))),
        *(("trimmed_mean", count, liars) for count, liars in ((3, 1), (5, 1), (10, 2), (11, 3))),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_colluding_minority_stays_within_the_honest_range(name: str, count: int, liars: int, seed: int) -> None:
    states = sites_states(count, seed)
    lies = torch.Generator().manual_seed(seed)
    for site in sorted(states)[:liars]:  # all push one way, number by number
        states[site] = {
            key: 1e6 * (torch.rand(value.shape, generator=lies) - float(seed == 1))
            for key, value in states[site].items()
        }
    honest = [states[site] for site in sorted(states)[liars:]]
    aggregator = rule(name, count)
    found = aggregate_states(states, equal_weights(states), aggregator)
    drift = aggregate_drifts({site: state["b"] for site, state in states.items()}, equal_weights(states), aggregator)
    assert drift is not None
    for key, value in [*found.items(), ("b", drift)]:
        stacked = torch.stack([state[key] for state in honest])
        assert bool((value >= stacked.min(0).values).all())
        assert bool((value <= stacked.max(0).values).all())
    mean = aggregate_states(states, equal_weights(states), Mean())
    assert float(mean["a"].abs().max()) > 1e3  # whereas the mean follows them


def test_a_change_is_clipped_to_its_norm_in_its_direction_or_left_as_it_is() -> None:
    state, reference = sites_states(2).values()
    norm = update_norm(state, reference)
    for limit in (0.0, norm, 2 * norm):
        same = clip_update(state, reference, limit, norm)
        assert all(same[name] is value for name, value in state.items())
    short = clip_update(state, reference, norm / 4, norm)
    assert update_norm(short, reference) == pytest.approx(norm / 4, rel=1e-5)
    for name, value in state.items():
        assert torch.allclose(short[name] - reference[name], (value - reference[name]) / 4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "krum"}, "known: mean, median, trimmed_mean"),
        ({"name": "median", "weighting": "num_examples"}, "weighting to equal"),
        ({"name": "median", "min_train_nodes": 2}, "min_train_nodes"),
        ({"name": "trimmed_mean", "secure_aggregation": True}, "only their sum"),
        ({"name": "mean", "secure_aggregation": True, "clip_update_norm": 1.0}, "clip_update_norm to 0"),
        ({"name": "trimmed_mean", "beta": 0.5}, "beta is 0.5"),
        ({"name": "mean", "clip_update_norm": -1.0}, "clip_update_norm is -1"),
        ({"name": "mean", "clip_update_norm": 200.0}, "use 0 to max_update_norm, 100"),
    ],
)
def test_a_rule_that_cannot_be_kept_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rule(**{"sites": 4, **settings})  # type: ignore[arg-type]


def test_a_good_answer_passes_with_its_norm() -> None:
    assert check_result(GOOD, REFERENCE, FORM, 10.0) == pytest.approx(7**0.5)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"state": {**GOOD.state, "a": torch.tensor([1.0, float("nan"), 0.0])}}, "NaN"),
        ({"state": {**GOOD.state, "a": torch.ones(4)}}, "shape"),
        ({"state": {**GOOD.state, "a": torch.ones(3) * 1e6}}, "norm"),
        ({"drift": None}, "drift"),
        ({"drift": torch.zeros(3, 1, 1)}, "drift"),
        ({"drift": torch.full((4, 1, 1), float("nan"))}, "NaN"),
        ({"drift": torch.zeros(4, 1, 1).double()}, "float64, not float32"),
        ({"drift": torch.full((4, 1, 1), 21.0)}, "reaches 21"),
        ({"numbers": TrainNumbers(10, 4, 1.0, float("inf"), 2.0)}, "infinite"),
        ({"numbers": TrainNumbers(0, 4, 1.0, 0.5, 2.0)}, "0 visits"),
        ({"numbers": TrainNumbers(10, 11, 1.0, 0.5, 2.0)}, "11 patients"),
    ],
)
def test_a_bad_answer_is_refused_with_its_reason(changed: dict[str, object], words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        check_result(replace(GOOD, **changed), REFERENCE, FORM, 10.0)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    saved = Checkpoint(
        study_digest="study",
        base_digest="base",
        modality_digest="modality",
        round=3,
        state={"a": torch.randn(4)},
        records=[{"round": 1, "sites": {}}],
        drifts=CollectedDrifts(
            {"p": torch.randn(4, 1, 1), "q": torch.randn(4, 1, 1)},
            {"p": 1 / 3, "q": 2.0},
            torch.randn(4, 1, 1),
            {"mean": torch.randn(64).double()},
        ),
    )
    write_checkpoint(tmp_path, saved)
    read = read_checkpoint(tmp_path)
    plain = [
        {key: value for key, value in vars(one).items() if key not in ("state", "drifts")} for one in (saved, read)
    ]
    assert plain[0] == plain[1]
    assert torch.equal(read.state["a"], saved.state["a"])
    assert read.drifts.weights == saved.drifts.weights
    for name in ("sites", "basis"):
        before, after = getattr(saved.drifts, name), getattr(read.drifts, name)
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) and value.dtype == after[key].dtype for key, value in before.items())
    assert read.drifts.mean is not None
    assert saved.drifts.mean is not None
    assert torch.equal(read.drifts.mean, saved.drifts.mean)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    """The kernel refuses to let any file of the child grow past 4 kB, as a full disk would."""
    write_checkpoint(tmp_path, Checkpoint("digest", "base", "modality", 1, {"a": torch.ones(10)}, []))
    large = Checkpoint("digest", "base", "modality", 2, {"a": torch.ones(100_000)}, [])
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_checkpoint(tmp_path, large)
        except CheckpointError as error:
            os._exit(7 if "free space" in str(error) else 8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert read_checkpoint(tmp_path).round == 1
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_damaged_checkpoint_is_an_error(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path)
