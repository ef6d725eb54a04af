"""A study whose updates travel rounded: with honest sites, with sites that lie, and with a server that dies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict

from ld_client.kept_tensors import KeptTensors
from ld_client.site_config import RESIDUALS
from ld_common.adapters.state_dict import update_norm
from ld_common.core.state import State
from ld_common.protocol import messages
from ld_common.protocol.messages import TrainResult, TrainTask
from ld_common.protocol.wire_formats import SCALES, encode_state
from ld_common.release.release import Release, read_release
from ld_server.server_app import run_study
from ld_server.stored_states import stored_state
from tests.server.test_resume import Crash, Learners, assert_same, four_rounds
from tests.server.test_strategy import (
    MODALITY,
    Behaviour,
    LocalGrid,
    honest,
    load_channels,
    moved,
    study,
    task_identity,  # noqa: F401  (a fixture)
)


class RoundingGrid(LocalGrid):
    """Sites that send their updates in a study's format, and each to another side."""

    wire = "int8"

    def _good(self, name: str, task: TrainTask) -> TrainResult:
        result = super()._good(name, task)
        draw = torch.Generator().manual_seed(sum(name.encode()))
        state = {key: value + 0.01 * torch.randn(value.shape, generator=draw) for key, value in result.state.items()}
        return replace(result, state=encode_state(self.wire, state, task.state, {}).tensors)


class BFloat16Grid(RoundingGrid):
    wire = "bfloat16"


class ExactGrid(RoundingGrid):
    wire = "float32"


class TurnedGrid(RoundingGrid):
    """Its replies come in the other order."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return reversed(list(super().send_and_receive(messages, timeout=timeout)))


def released(grid: type[RoundingGrid], base: Path, output: Path, **federation: Any) -> Release:
    sites = dict.fromkeys(federation.pop("sites", ["p", "q", "r"]), honest)
    config = study(base, output / grid.__name__, list(sites), wire=grid.wire, **federation)
    return read_release(run_study(grid(sites, load_channels(base)), config, MODALITY))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"weighting": "num_examples"}, {"sites": ["p"], "min_train_nodes": 1}])
def test_a_rounded_study_is_near_the_exact_one_in_any_order_of_replies(
    options: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    exact, half, first, second = (
        released(grid, tiny_base, tmp_path, **options) for grid in (ExactGrid, BFloat16Grid, RoundingGrid, TurnedGrid)
    )
    start = study(tiny_base, tmp_path, ["p", "q"])
    far = moved(exact.state, start)
    assert 0 < update_norm(half.state, exact.state) < 0.003 * far
    assert 0 < update_norm(first.state, exact.state) < 0.01 * far
    assert all(torch.equal(value, second.state[name]) for name, value in first.state.items())
    for release, share in ((half, 0.5), (first, 0.25)):
        sent, plain = (one.manifest["rounds"][0]["sites"]["p"]["uplink_bytes"] for one in (release, exact))
        assert sent < (share + 0.05) * plain


def with_sent(change: Callable[[State], State]) -> Behaviour:
    def behave(result: TrainResult) -> RecordDict:
        return messages.pack_result(replace(result, state=change(dict(result.state))))

    return behave


LIES: dict[str, tuple[Callable[[State], State], str]] = {
    "NaN scale": (lambda sent: {**sent, SCALES: sent[SCALES] * float("nan")}, "scales"),
    "infinite scale": (lambda sent: {**sent, SCALES: sent[SCALES] / 0}, "scales"),
    "huge scale": (lambda sent: {**sent, SCALES: sent[SCALES] * 1e6}, "max_update_norm"),
    "largest scale": (lambda sent: {**sent, SCALES: torch.full_like(sent[SCALES], 3e38)}, "max_update_norm|infinite"),
    "no scales": (lambda sent: {name: value for name, value in sent.items() if name != SCALES}, "no scales"),
    "float32": (lambda sent: {name: value.float() for name, value in sent.items()}, "float32, not torch.int8"),
    "a type of numbers less": (lambda sent: sent | {min(sent): sent[min(sent)].bool()}, "bool, not torch.int8"),
    "a tensor less": (lambda sent: {name: sent[name] for name in list(sent)[1:]}, "missing"),
    "no tensors": (lambda sent: {}, "missing"),
}


@pytest.mark.slow
@pytest.mark.attack
@pytest.mark.parametrize("kind", LIES)
def test_a_site_that_sends_no_rounded_update_is_left_out_with_the_reason(
    kind: str, tiny_base: Path, tmp_path: Path
) -> None:
    change, words = LIES[kind]
    config = study(tiny_base, tmp_path / "lied", ["p", "q", "z"], wire="int8", rounds=1)
    grid = RoundingGrid({"p": honest, "q": honest, "z": with_sent(change)}, load_channels(tiny_base))
    release = read_release(run_study(grid, config, MODALITY))
    (record,) = release.manifest["rounds"]
    assert sorted(record["sites"]) == ["p", "q"]
    assert re.search(words, record["left_out"]["z"])
    alone = released(RoundingGrid, tiny_base, tmp_path, sites=["p", "q"], rounds=1)
    assert all(torch.equal(value, alone.state[name]) for name, value in release.state.items())


@pytest.mark.parametrize("weighting", ["equal", "num_examples"])
def test_what_is_clipped_is_the_update_that_the_server_makes_of_it(
    weighting: str, tiny_base: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"sites": ["p"], "min_train_nodes": 1, "rounds": 1, "weighting": weighting}
    release = released(RoundingGrid, tiny_base, tmp_path, clip_update_norm=0.05, **options)
    record = release.manifest["rounds"][0]["sites"]["p"]
    assert record["clipped"] and record["update_norm"] > 0.05
    assert moved(release.state, study(tiny_base, tmp_path, ["p", "q"])) == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_a_site_signs_what_travels(wire: str) -> None:
    state = {"a": torch.randn(3, 4), "b": torch.randn(())}
    sent = encode_state(wire, state, {name: torch.zeros_like(value) for name, value in state.items()}, {}).tensors
    result = TrainResult("p", 1, sent, None, None)
    arrived = messages.unpack_result(messages.pack_result(result), stored_state)
    assert arrived.content_digest() == result.content_digest()
    for name, value in sent.items():
        altered = replace(result, state={**sent, name: value * 0})
        assert altered.content_digest() != result.content_digest()


class RoundingLearners(Learners):
    """Sites that keep what rounding took, in their folders."""

    def __init__(self, base: Path, folder: Path, crash: int = 0) -> None:
        super().__init__(base, crash)
        self.folder = folder

    def _good(self, name: str, task: TrainTask) -> TrainResult:
        result, kept = super()._good(name, task), KeptTensors(self.folder / name, RESIDUALS, "study")
        sent = encode_state("int8", dict(result.state), task.state, kept.before(task.round, task.state))
        kept.write(task.round, sent.residual)
        return replace(result, state=sent.tensors)


@pytest.mark.slow
@pytest.mark.parametrize("crash", [2, 4])
def test_a_server_that_dies_repeats_a_rounded_round_to_the_same_bytes(
    crash: int, tiny_base: Path, tmp_path: Path
) -> None:
    whole, broken = (four_rounds(tiny_base, tmp_path / name, wire="int8") for name in ("whole", "broken"))
    run_study(RoundingLearners(tiny_base, tmp_path / "sites of whole"), whole, MODALITY)
    sites = tmp_path / "sites of broken"
    with pytest.raises(Crash):
        run_study(RoundingLearners(tiny_base, sites, crash), broken, MODALITY)
    run_study(RoundingLearners(tiny_base, sites), broken, MODALITY, resume=True)
    assert_same(tmp_path / "broken", tmp_path / "whole")
