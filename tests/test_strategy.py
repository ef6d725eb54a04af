"""A whole study against sites that lie, break and stay away: Flower's grid is played by one small class."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from ld_common import messages as wire
from ld_common.config import from_mapping, load_config
from ld_common.errors import FederationError
from ld_common.messages import TrainNumbers, TrainResult, TrainTask
from ld_common.modality import Modality
from ld_common.release import load_release_base, read_release
from ld_common.study import StudyConfig
from ld_server.app import run_study
from ld_server.checkpoint import read_checkpoint


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower's processes set before an app runs."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


Behaviour = Callable[[TrainResult], RecordDict]
MODALITY = load_config(Modality, Path(__file__).parents[1] / "configs/modalities/brain_mri.yaml")


class LocalGrid(Grid):
    """Sites as functions from a good answer to what they send instead; messages get ids as Flower's grid gives them."""

    def __init__(self, sites: dict[str, Behaviour], channels: int) -> None:
        self.sites = dict(enumerate(sites.items(), start=11))
        self.channels = channels

    def get_node_ids(self) -> Iterable[int]:
        return list(self.sites)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            reply = self._reply(message)
            if reply is not None:
                replies.append(reply)
        return reversed(replies)

    def _reply(self, message: Message) -> Message | None:
        name, behave = self.sites[message.metadata.dst_node_id]
        if message.metadata.message_type.startswith("query"):
            return Message(wire.pack_name(name), reply_to=message)
        task = wire.unpack_task(message.content)
        content = behave(self._good(name, task))
        return None if content is None else Message(content, reply_to=message)

    def _good(self, name: str, task: TrainTask) -> TrainResult:
        shift = {"p": 0.01, "q": 0.03}.get(name, 0.02)
        state = {key: value + shift for key, value in task.state.items()}
        drift = torch.full((self.channels, 1, 1), shift)
        return TrainResult(name, task.round, state, drift, TrainNumbers(10, 4, 1.0, 0.5, 0.1))

    def set_run(self, run: object) -> None: ...

    @property
    def run(self) -> object:  # type: ignore[override]
        return None

    def create_message(self, *_: object) -> Message:  # type: ignore[override]
        raise AssertionError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise AssertionError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise AssertionError


def study(base: Path, output: Path, sites: list[str], **federation: object) -> StudyConfig:
    settings = {"rounds": 2, "sites": sites, "min_sites": 2, "wait_seconds": 0.1, "max_update_norm": 50.0, **federation}
    return from_mapping(
        StudyConfig,
        {"name": "test", "base_model": str(base), "output": str(output), "scheme": {"rank": 2}, "federation": settings},
    )


def honest(result: TrainResult) -> RecordDict:
    return wire.pack_result(result)


def with_state(change: Callable[[dict[str, torch.Tensor]], None]) -> Behaviour:
    def behave(result: TrainResult) -> RecordDict:
        state = dict(result.state)
        change(state)
        return wire.pack_result(replace(result, state=state))

    return behave


def set_first(value: Callable[[torch.Tensor], torch.Tensor]) -> Behaviour:
    return with_state(lambda state: state.update({min(state): value(state[min(state)])}))


BAD: dict[str, tuple[Behaviour, str]] = {
    "nan": (set_first(lambda tensor: tensor * float("nan")), "NaN"),
    "shape": (set_first(lambda tensor: tensor[:1]), "shape"),
    "half": (set_first(lambda tensor: tensor.half()), "float16"),
    "missing": (with_state(lambda state: state.pop(min(state))), "missing"),
    "extra": (with_state(lambda state: state.update({"zz": torch.zeros(1)})), "unknown"),
    "huge": (set_first(lambda tensor: tensor * 1e6 + 1e6), "norm"),
    "other name": (lambda result: wire.pack_result(replace(result, site="q")), "of site 'q'"),
    "old round": (lambda result: wire.pack_result(replace(result, round=result.round - 1)), "round"),
    "no drift": (lambda result: wire.pack_result(replace(result, drift=None)), "drift"),
    "int drift": (lambda result: wire.pack_result(replace(result, drift=result.drift.int())), "int32"),
    "huge drift": (lambda result: wire.pack_result(replace(result, drift=result.drift + 1e30)), "reaches"),
    "error code": (lambda result: wire.pack_error("store"), "store"),
    "unknown code": (lambda result: wire.pack_error("Jane Doe"), "stays at the site"),
    "nonsense": (lambda result: RecordDict({"x": ConfigRecord({"y": 1})}), "cannot be read"),
    "garbage array": (
        lambda result: RecordDict({"state": ArrayRecord(), "site": ConfigRecord({"name": "z"})}),
        "cannot be read",
    ),
    "silent": (lambda result: None, "did not answer"),  # type: ignore[dict-item,return-value]
}


@pytest.mark.parametrize("kind", sorted(BAD))
def test_a_bad_answer_is_left_out_with_its_reason_and_the_run_goes_on(
    tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    behave, words = BAD[kind]
    channels = load_channels(tiny_base)
    grid = LocalGrid({"p": honest, "q": honest, "z": behave}, channels)
    folder = run_study(grid, study(tiny_base, tmp_path / kind, ["p", "q", "z"]), MODALITY)
    release = read_release(folder)
    rounds = release.manifest["rounds"]
    assert [sorted(record["sites"]) for record in rounds] == [["p", "q"], ["p", "q"]]
    assert all(words in record["left_out"]["z"] for record in rounds)
    alone = run_study(
        LocalGrid({"p": honest, "q": honest}, channels), study(tiny_base, tmp_path / "alone", ["p", "q"]), MODALITY
    )
    expected = read_release(alone)
    assert all(torch.equal(value, expected.state[name]) for name, value in release.state.items())
    assert release.drift is not None
    assert torch.allclose(release.drift.mean, torch.full((channels, 1, 1), 0.02))
    assert sorted(release.site_drifts) == ["p", "q"]


def test_a_round_below_the_minimum_leaves_the_adapter_and_the_release_loads(tiny_base: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def breaks_in_round_two(result: TrainResult) -> RecordDict:
        calls.append(result.round)
        return wire.pack_error("error") if result.round == 2 else wire.pack_result(result)

    grid = LocalGrid({"p": honest, "q": breaks_in_round_two}, load_channels(tiny_base))
    folder = run_study(grid, study(tiny_base, tmp_path, ["p", "q"]), MODALITY)
    release = read_release(folder)
    assert [record["counted"] for record in release.manifest["rounds"]] == [True, False]
    assert read_checkpoint(tmp_path).round == 2
    assert load_release_base(release).digest == release.base_digest
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2]


def test_too_few_sites_end_the_wait_with_the_names_of_the_missing(tiny_base: Path, tmp_path: Path) -> None:
    grid = LocalGrid({"p": honest, "stranger": honest}, load_channels(tiny_base))
    with pytest.raises(FederationError, match="missing: q, r"):
        run_study(grid, study(tiny_base, tmp_path, ["p", "q", "r"]), MODALITY)


def test_a_site_that_is_not_there_is_recorded_and_the_rest_goes_on(tiny_base: Path, tmp_path: Path) -> None:
    grid = LocalGrid({"p": honest, "q": honest}, load_channels(tiny_base))
    release = read_release(run_study(grid, study(tiny_base, tmp_path, ["p", "q", "r"]), MODALITY))
    assert all(record["left_out"] == {"r": "it was not connected"} for record in release.manifest["rounds"])


def load_channels(base: Path) -> int:
    return int(json.loads((base / "unet" / "config.json").read_text())["in_channels"])
