"""A whole study against sites that lie, break and stay away: Flower's grid is played by one small class."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import save

from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.adapters.state_dict import update_norm
from ld_common.core.config import from_mapping, load_config
from ld_common.core.errors import FederationError
from ld_common.diffusion.base_model import load_denoiser
from ld_common.diffusion.drift import LatentDrift
from ld_common.imaging.modality import Modality
from ld_common.protocol import messages as wire
from ld_common.protocol.messages import TrainNumbers, TrainResult, TrainTask
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import load_release_base, read_release
from ld_server.checkpoint import read_checkpoint
from ld_server.server_app import run_study


@pytest.fixture(autouse=True, scope="module")
def task_identity() -> Iterator[None]:
    """What Flower's processes set before an app runs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_task_id", "_run_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        yield


Behaviour = Callable[[TrainResult], RecordDict]
MODALITY = load_config(Modality, Path(__file__).parents[2] / "configs/modalities/brain_mri.yaml")


class LocalGrid(Grid):
    """Sites as functions from a good answer to what they send instead; messages get ids as Flower's grid gives them."""

    def __init__(self, sites: dict[str, Behaviour], channels: int) -> None:
        self.sites = dict(enumerate(sites.items(), start=11))
        self.channels = channels
        self.timeouts: set[float | None] = set()
        """How long training was waited for."""

    def get_node_ids(self) -> Iterable[int]:
        return list(self.sites)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = []
        for message in messages:
            if message.metadata.message_type == "train":
                self.timeouts.add(timeout)
            message.metadata.__dict__["_message_id"] = str(uuid4())
            reply = self._reply(message)
            if reply is not None:
                replies.append(reply)
        return reversed(replies)

    def _reply(self, message: Message) -> Message | None:
        name, behave = self.sites[message.metadata.dst_node_id]
        if message.metadata.message_type.startswith("query"):
            return Message(wire.pack_name(name), reply_to=message)
        if message.metadata.message_type == "evaluate":
            return Message(wire.pack_error("held_out"), reply_to=message)
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
    settings = {
        "rounds": 2,
        "sites": sites,
        "min_train_nodes": 2,
        "wait_seconds": 0.1,
        "max_update_norm": 50.0,
        **federation,
    }
    return from_mapping(
        StudyConfig,
        {
            "name": "test",
            "base_model": str(base),
            "output": str(output),
            "adapter": {"rank": 2, "targets": ["to_k", "to_v"]},
            "federation": settings,
        },
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


def with_array(array: Array) -> Behaviour:
    """An answer whose first array is another one, as only a node that is not ours would pack it."""

    def behave(result: TrainResult) -> RecordDict:
        content = wire.pack_result(result)
        state = content.array_records["state"]
        state[min(state)] = array
        return content

    return behave


def claiming(shape: tuple[int, ...]) -> Array:
    """A few bytes whose header claims an array of this shape."""
    array = Array(np.zeros(1, np.float32))
    claimed = array.data.replace(b"(1,), }", f"{shape}, }}".encode())
    return Array(dtype="float32", shape=shape, stype=array.stype, data=claimed)


def masked(vector: object) -> Behaviour:
    """An answer as of secure aggregation, for which nobody asked."""
    return lambda result: wire.pack_result(replace(result, state={}, drift=None, secure={"vector": vector}))


BAD: dict[str, tuple[Behaviour, str]] = {
    "nan": (set_first(lambda tensor: tensor * float("nan")), "NaN"),
    "infinite": (set_first(lambda tensor: tensor + float("inf")), "infinite"),
    "double": (set_first(lambda tensor: tensor.double()), "float64"),
    "complex": (set_first(lambda tensor: tensor + 0j), "complex64"),
    "nan drift": (lambda result: wire.pack_result(replace(result, drift=result.drift * float("nan"))), "NaN"),
    "scaled": (with_state(lambda state: state.update({key: value * 1e6 for key, value in state.items()})), "norm"),
    "giant": (set_first(lambda tensor: torch.zeros(3_000_000)), "bytes"),
    "giant words": (
        lambda result: RecordDict({**wire.pack_result(result), "words": ConfigRecord({"x": "y" * 4_000_000})}),
        "bytes",
    ),
    "giant claim": (with_array(claiming((10**13,))), "cannot be read"),
    "pickle": (with_array(Array("object", (1,), "numpy.ndarray", b"\x80\x04.")), "cannot be read"),
    "no numbers": (lambda result: wire.pack_result(replace(result, numbers=None)), "exactly the fields"),
    "masked": (masked(b"1234"), "exactly the fields"),
    "masked number": (masked(2**40), "cannot be read|exactly the fields"),
    "long name": (lambda result: wire.pack_result(replace(result, site="<b>\n\x1b[31m" + "a" * 9999)), "of site '<b>"),
    "node error": (lambda result: Error(3, "Jane Doe"), "its node failed with code 3"),  # type: ignore[dict-item,return-value]
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
    "no tensors": (with_array(Array(np.arange(64, dtype=np.uint8))), "cannot be read"),
    "cut tensors": (with_array(Array(np.frombuffer(save({"a": torch.zeros(64)})[:200], np.uint8))), "cannot be read"),
    "floats": (with_array(Array(np.zeros(8, np.float32))), "cannot be read"),
    "garbage array": (
        lambda result: RecordDict({"state": ArrayRecord(), "site": ConfigRecord({"name": "z"})}),
        "cannot be read",
    ),
    "silent": (lambda result: None, "did not reply"),  # type: ignore[dict-item,return-value]
}


@pytest.fixture(scope="module")
def honest_state(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The adapter that two honest sites train when no third one takes part."""
    grid = LocalGrid({"p": honest, "q": honest}, load_channels(tiny_base))
    folder = run_study(grid, study(tiny_base, tmp_path_factory.mktemp("honest") / "run", ["p", "q"]), MODALITY)
    return read_release(folder).state


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(BAD))
def test_a_bad_answer_is_left_out_with_its_reason_and_the_run_goes_on(
    tiny_base: Path, tmp_path: Path, honest_state: dict[str, torch.Tensor], kind: str
) -> None:
    behave, words = BAD[kind]
    channels = load_channels(tiny_base)
    grid = LocalGrid({"p": honest, "q": honest, "z": behave}, channels)
    folder = run_study(grid, study(tiny_base, tmp_path / kind, ["p", "q", "z"]), MODALITY)
    release = read_release(folder)
    rounds = release.manifest["rounds"]
    assert [sorted(record["sites"]) for record in rounds] == [["p", "q"], ["p", "q"]]
    assert all(re.search(words, record["left_out"]["z"]) for record in rounds)
    assert all(len(why) < 400 and why.isprintable() for record in rounds for why in record["left_out"].values())
    assert "Jane Doe" not in json.dumps(rounds)
    assert release.state.keys() == honest_state.keys()
    assert all(torch.equal(value, honest_state[name]) for name, value in release.state.items())
    assert isinstance(release.drift, LatentDrift)
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


def test_nodes_in_memory_find_their_task_when_they_come_to_it(tiny_base: Path, tmp_path: Path) -> None:
    class LateGrid(LocalGrid):
        """As Flower's in a simulation: a node reads its message once the server waits for the reply."""

        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            sent = list(messages)
            for message in sent:
                message.metadata.__dict__["_message_id"] = str(uuid4())
            return (reply for message in sent if (reply := self._reply(message)) is not None)

    grid = LateGrid({"p": honest, "q": honest}, load_channels(tiny_base))
    folder = run_study(grid, study(tiny_base, tmp_path / "run", ["p", "q"]), MODALITY)
    assert [list(record["sites"]) for record in read_release(folder).manifest["rounds"]] == [["p", "q"]] * 2


def test_too_few_sites_end_the_wait_with_the_names_of_the_missing(tiny_base: Path, tmp_path: Path) -> None:
    grid = LocalGrid({"p": honest, "stranger": honest}, load_channels(tiny_base))
    with pytest.raises(FederationError, match="missing: q, r"):
        run_study(grid, study(tiny_base, tmp_path, ["p", "q", "r"]), MODALITY)


def test_a_site_that_is_not_there_is_recorded_and_the_rest_goes_on(tiny_base: Path, tmp_path: Path) -> None:
    grid = LocalGrid({"p": honest, "q": honest}, load_channels(tiny_base))
    release = read_release(run_study(grid, study(tiny_base, tmp_path, ["p", "q", "r"]), MODALITY))
    assert all(record["left_out"] == {"r": "it was not connected"} for record in release.manifest["rounds"])


def test_an_answer_of_an_earlier_round_is_not_counted_again(tiny_base: Path, tmp_path: Path) -> None:
    kept: list[RecordDict] = []

    def replays(result: TrainResult) -> RecordDict:
        kept.append(wire.pack_result(result))
        return kept[0]

    grid = LocalGrid({"p": honest, "q": honest, "z": replays}, load_channels(tiny_base))
    release = read_release(run_study(grid, study(tiny_base, tmp_path, ["p", "q", "z"]), MODALITY))
    first, second = release.manifest["rounds"]
    assert sorted(first["sites"]) == ["p", "q", "z"]
    assert sorted(second["sites"]) == ["p", "q"]
    assert "round 1" in second["left_out"]["z"]


def test_of_two_answers_to_one_task_one_counts(tiny_base: Path, tmp_path: Path) -> None:
    class Doubled(LocalGrid):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            return [reply for reply in super().send_and_receive(messages, timeout=timeout) for _ in range(2)]

    sites, channels = {"p": honest, "q": honest}, load_channels(tiny_base)
    doubled, single = (
        read_release(run_study(grid(sites, channels), study(tiny_base, tmp_path / grid.__name__, ["p", "q"]), MODALITY))
        for grid in (Doubled, LocalGrid)
    )
    assert all(torch.equal(value, single.state[name]) for name, value in doubled.state.items())


def test_a_round_waits_for_answers_as_long_as_the_study_says_and_the_task_lives_as_long(
    tiny_base: Path, tmp_path: Path
) -> None:
    lifetimes: set[float] = set()

    class Watched(LocalGrid):
        def _reply(self, message: Message) -> Message | None:
            if message.metadata.message_type == "train":
                lifetimes.add(message.metadata.ttl)
            return super()._reply(message)

    grid = Watched({"p": honest, "q": honest}, load_channels(tiny_base))
    run_study(grid, study(tiny_base, tmp_path, ["p", "q"], round_timeout_seconds=77.0), MODALITY)
    assert grid.timeouts == {77.0}
    assert lifetimes == {77.0}


def test_a_round_that_cannot_count_asks_nobody_to_train(
    tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, int]] = []

    def noted(result: TrainResult) -> RecordDict:
        asked.append((result.site, result.round))
        return wire.pack_result(result)

    class Shrinking(LocalGrid):
        """q leaves when the first round has ended."""

        def get_node_ids(self) -> Iterable[int]:
            return list(self.sites)[: 1 if ("q", 1) in asked else 2]

    grid = Shrinking({"p": noted, "q": noted}, load_channels(tiny_base))
    release = read_release(run_study(grid, study(tiny_base, tmp_path, ["p", "q"]), MODALITY))
    first, second = release.manifest["rounds"]
    assert (first["counted"], second["counted"]) == (True, False)
    assert asked == [("p", 1), ("q", 1)]
    assert set(second["left_out"]) == {"p", "q"}
    assert second["left_out"]["q"] == "it was not connected"
    assert "missing: q" in second["failure"]
    assert "round 2: waits up to 0 s for q" in capfd.readouterr().out


def test_clipping_bounds_what_one_site_moves_and_is_recorded(tiny_base: Path, tmp_path: Path) -> None:
    def far(result: TrainResult) -> RecordDict:
        return wire.pack_result(replace(result, state={key: value + 1 for key, value in result.state.items()}))

    sites = {"p": honest, "q": far}
    settings: dict[str, object] = {"rounds": 1, "weighting": "equal", "max_update_norm": 1e4}

    def norms(**federation: object) -> tuple[dict[str, object], float]:
        output = tmp_path / str(federation.get("clip_update_norm", "off"))
        own = study(tiny_base, output, ["p", "q"], **(settings | federation))
        release = read_release(run_study(LocalGrid(sites, load_channels(tiny_base)), own, MODALITY))
        record = release.manifest["rounds"][0]["sites"]
        untouched = study(tiny_base, tmp_path / "start", ["p", "q"], **settings)
        return {name: (record[name]["clipped"], record[name]["update_norm"]) for name in record}, moved(
            release.state, untouched
        )

    free, far_norm = norms()
    (_, small), (_, large) = free["p"], free["q"]  # type: ignore[misc]
    assert free == {"p": (False, small), "q": (False, large)}
    clipped, near_norm = norms(clip_update_norm=2 * small)
    assert clipped == {"p": (False, small), "q": (True, large)}
    # the updates of both point the same way
    assert far_norm == pytest.approx((small + large) / 2, rel=1e-4)
    assert near_norm == pytest.approx((small + 2 * small) / 2, rel=1e-4)


def moved(state: dict[str, torch.Tensor], own: StudyConfig) -> float:
    """How far a released adapter is from the study's start."""
    start = inject(load_denoiser(own.base_model), read_adapter(own.adapter), own.seed).state()
    return update_norm(state, start)


@pytest.mark.slow
def test_a_colluding_minority_cannot_move_a_robust_study(tiny_base: Path, tmp_path: Path) -> None:
    def lies(result: TrainResult) -> RecordDict:
        drift = torch.full((4, 1, 1), 19.0)
        return wire.pack_result(
            replace(result, state={key: value + 0.5 for key, value in result.state.items()}, drift=drift)
        )

    names = ["p", "q", "r", "y", "z"]
    options = {"mean": {}, "median": {}, "trimmed_mean": {"beta": 0.4}}
    for rule in options:
        aggregation = {"name": rule, **options[rule]}
        settings: dict[str, object] = {"aggregation": aggregation, "weighting": "equal", "min_train_nodes": 3}
        own = study(tiny_base, tmp_path / rule, names, max_update_norm=1e4, **settings)
        sites = dict.fromkeys("pqr", honest) | dict.fromkeys("yz", lies)
        release = read_release(run_study(LocalGrid(sites, load_channels(tiny_base)), own, MODALITY))
        assert isinstance(release.drift, LatentDrift)
        step, drift = moved(release.state, own), float(release.drift.mean.max())
        most = 2 * 0.03 * sum(value.numel() for value in release.state.values()) ** 0.5  # two rounds, q's shift
        assert (step > most and drift > 1) if rule == "mean" else (0 < step <= most and 0.01 <= drift <= 0.03)


def load_channels(base: Path) -> int:
    return int(json.loads((base / "unet" / "config.json").read_text())["in_channels"])


def test_a_start_brings_its_frozen_part_to_the_sites_and_into_the_release(tiny_base: Path, tmp_path: Path) -> None:
    sent: list[dict[str, torch.Tensor]] = []

    class Watched(LocalGrid):
        def _good(self, name: str, task: TrainTask) -> TrainResult:
            sent.append(task.frozen)
            return super()._good(name, task)

    sites, channels = {"p": honest, "q": honest}, load_channels(tiny_base)
    public = study(tiny_base, tmp_path / "public", ["p", "q"], rounds=1)
    start = run_study(Watched(sites, channels), public, MODALITY)
    assert not any(sent)
    own = study(tiny_base, tmp_path / "own", ["p", "q"], rounds=1)
    own.adapter, own.seed, own.start = {**own.adapter, "freeze_a": True}, 5, str(start)
    learned = read_release(start).state
    release = read_release(run_study(Watched(sites, channels), own, MODALITY))
    frozen = {name for name in learned if ".lora_A." in name}
    assert set(sent[-1]) == frozen
    for name, value in learned.items():
        assert torch.equal(release.state[name], value) == (name in frozen)
    shutil.rmtree(tmp_path / "public")  # the checkpoint has it all
    again = read_release(run_study(Watched(sites, channels), own, MODALITY, resume=True))
    assert all(torch.equal(value, release.state[name]) for name, value in again.state.items())
