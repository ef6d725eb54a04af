"""A server that is killed goes on where it was: to the bytes of a run that never broke."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from ld_client.site_config import load_modality, load_site
from ld_common.core.config import from_mapping
from ld_common.core.errors import CheckpointError, FederationError
from ld_common.core.seeding import derive_seed, torch_generator
from ld_common.protocol import messages as wire
from ld_common.protocol.messages import TrainNumbers, TrainResult, TrainTask
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import ADAPTER, MANIFEST
from ld_server.checkpoint import NAME, PREVIOUS, Checkpoint, find_checkpoint, read_checkpoint, write_checkpoint
from ld_server.drift_collection import CollectedDrifts
from ld_server.round_log import ROUNDS, locked
from ld_server.server_app import run_study
from tests.server.test_strategy import MODALITY, LocalGrid, honest, load_channels, study
from tests.simulations.test_secure_federation import Nodes, files, options  # noqa: F401  (`files` is a fixture)

SITES = ["p", "q", "r"]


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Crash(BaseException):
    """The server's end."""


class Learners(LocalGrid):
    """Sites whose answers follow from the state, the round and their name; r fails in rounds 2 and 4.

    In round `crash` the server dies: while the sites train.
    """

    def __init__(self, base: Path, crash: int = 0) -> None:
        super().__init__(dict.fromkeys(SITES, honest), load_channels(base))
        self.crash = crash
        self.asked: list[int] = []

    def _reply(self, message: Message) -> Message | None:
        if message.metadata.message_type == "train":
            name, number = self.sites[message.metadata.dst_node_id][0], wire.unpack_task(message.content).round
            self.asked.append(number)
            if number == self.crash:
                raise Crash
            if (name, number) in (("r", 2), ("r", 4)):
                return Message(wire.pack_error("diverged"), reply_to=message)
        return super()._reply(message)

    def _good(self, name: str, task: TrainTask) -> TrainResult:
        generator = torch_generator(0, name, task.round)
        noise = {key: torch.randn(value.shape, generator=generator) for key, value in task.state.items()}
        state = {key: 0.9 * value + 0.01 * noise[key] for key, value in task.state.items()}
        drift = torch.randn(self.channels, 1, 1, generator=generator)
        visits = 10 + derive_seed(0, name, task.round) % 10
        return TrainResult(name, task.round, state, drift, TrainNumbers(visits, 4, 1.0, 0.5, 0.1))


def of_rounds(folder: Path) -> list[dict[str, Any]]:
    rounds = json.loads((folder / "release" / MANIFEST).read_text())["rounds"]
    return [without_times(record) for record in rounds]


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    sites = {
        name: {key: value for key, value in site.items() if key != "seconds"} for name, site in record["sites"].items()
    }
    return {key: value for key, value in record.items() if key not in ("seconds", "ended")} | {"sites": sites}


def listed(folder: Path) -> list[dict[str, Any]]:
    return [without_times(json.loads(line)) for line in (folder / ROUNDS).read_text().splitlines()]


def assert_same(resumed: Path, unbroken: Path) -> None:
    adapters = [(folder / "release" / ADAPTER).read_bytes() for folder in (resumed, unbroken)]
    assert adapters[0] == adapters[1]
    drifts = [json.loads((folder / "release" / MANIFEST).read_text())["drift"] for folder in (resumed, unbroken)]
    assert drifts[0] == drifts[1]
    assert of_rounds(resumed) == of_rounds(unbroken) == listed(resumed) == listed(unbroken)


def four_rounds(base: Path, output: Path, **federation: Any) -> StudyConfig:
    return study(base, output, SITES, rounds=4, **federation)


@pytest.fixture(scope="module")
def unbroken(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of the study run in one go."""
    output = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_task_id", "_run_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        run_study(Learners(tiny_base), four_rounds(tiny_base, output), MODALITY)
    return output


def broken(base: Path, output: Path, crash: int) -> StudyConfig:
    """A study whose server died in this round."""
    config = four_rounds(base, output)
    with pytest.raises(Crash):
        run_study(Learners(base, crash), config, MODALITY)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("crash", [2, 3, 4])
def test_a_resumed_study_gives_the_bytes_of_an_unbroken_one(
    tiny_base: Path, tmp_path: Path, unbroken: Path, crash: int
) -> None:
    config = broken(tiny_base, tmp_path, crash)
    grid = Learners(tiny_base)
    run_study(grid, config, MODALITY, resume=True)
    assert sorted(set(grid.asked)) == list(range(crash, 5))
    assert_same(tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("aggregator", ["median", "trimmed_mean"])
def test_resuming_holds_for_robust_aggregates_with_clipping(tiny_base: Path, tmp_path: Path, aggregator: str) -> None:
    rule: dict[str, Any] = {
        "aggregation": {"name": aggregator},
        "weighting": "equal",
        "min_train_nodes": 3,
        "clip_update_norm": 0.2,
    }
    whole, parts = (four_rounds(tiny_base, tmp_path / name, **rule) for name in ("whole", "parts"))
    run_study(Learners(tiny_base), whole, MODALITY)
    with pytest.raises(Crash):
        run_study(Learners(tiny_base, 3), parts, MODALITY)
    run_study(Learners(tiny_base), parts, MODALITY, resume=True)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    rounds = of_rounds(tmp_path / "whole")
    assert [record["counted"] for record in rounds] == [True, False, True, False]
    assert all(site["clipped"] for site in rounds[0]["sites"].values())


@pytest.mark.slow
def test_resuming_holds_for_a_secure_sum(
    smallest_base: Path,
    files: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    class Dying(Nodes):
        """The server dies in round 3, when the sites shall train."""

        def _reply(self, message: Message) -> Message | None:
            if message.metadata.message_type == "train" and wire.unpack_task(message.content).round == 3:
                raise Crash
            return super()._reply(message)

    modality = load_modality(load_site(files["p"]))
    whole, parts = (
        from_mapping(StudyConfig, options(smallest_base, tmp_path / name, rounds=3, sites=SITES))
        for name in ("whole", "parts")
    )
    run_study(Nodes(files), whole, modality)
    (tmp_path / "again").mkdir()
    again = {}  # the same sites as if they had not run the study yet: no round is answered twice
    for name, file in files.items():
        again[name] = file.with_name(f"{name}-again.yaml")
        again[name].write_text(f"{file.read_text()}ledger: {tmp_path / 'again/ledger.sqlite'}\n")
    with pytest.raises(Crash):
        run_study(Dying(again), parts, modality)
    assert read_checkpoint(tmp_path / "parts").drifts.mean is not None
    for _ in range(2):  # the second time there is nothing left but to write the release
        run_study(Nodes(again), parts, modality, resume=True)
        assert_same(tmp_path / "parts", tmp_path / "whole")


def kill_again_and_again(base: Path, warm: StudyConfig, config: StudyConfig) -> list[int]:
    """Exit codes of processes that go on with the study, each killed after more of the processor's time than the last.

    Args:
        base: folder of the base.
        warm: a study that runs first, so that everything is imported before the first fork.
        config: the study that is killed until it ends.
    """
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, 1)
    run_study(Learners(base), warm, MODALITY)
    codes: list[int] = []
    while len(codes) < 100 and (not codes or codes[-1] == -signal.SIGPROF):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, 0.02 + 0.013 * len(codes))
            run_study(Learners(base), config, MODALITY, resume=True)
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return codes


@pytest.mark.slow
def test_a_server_that_is_killed_again_and_again_ends_with_the_same_bytes(
    tiny_base: Path, tmp_path: Path, unbroken: Path
) -> None:
    """The forks are those of a new process: a fork of this one would inherit locks of threads that other tests left."""
    warm, config = (four_rounds(tiny_base, tmp_path / name) for name in ("warm", "killed"))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        codes = process.submit(kill_again_and_again, tiny_base, warm, config).result()
    assert set(codes[:-1]) == {-signal.SIGPROF}
    assert codes[-1] == 0
    assert len(codes) > 2
    assert_same(tmp_path / "killed", unbroken)


def test_no_round_is_lost_or_doubled_when_the_server_dies_between_checkpoint_and_record(
    tiny_base: Path, tmp_path: Path, unbroken: Path
) -> None:
    class Unwritable(Learners):
        """Takes the record of the rounds away in round 3: its checkpoint is written, its line is not."""

        def _good(self, name: str, task: TrainTask) -> TrainResult:
            if task.round == 3 and (tmp_path / ROUNDS).is_file():
                (tmp_path / ROUNDS).unlink()
                (tmp_path / ROUNDS).mkdir()
            return super()._good(name, task)

    config = four_rounds(tiny_base, tmp_path)
    with pytest.raises(CheckpointError, match=r"rounds\.jsonl"):
        run_study(Unwritable(tiny_base), config, MODALITY)
    assert read_checkpoint(tmp_path).round == 3
    (tmp_path / ROUNDS).rmdir()
    (tmp_path / ROUNDS).write_text('{"round": 1}\n{"rou')  # and half a line besides
    grid = Learners(tiny_base)
    run_study(grid, config, MODALITY, resume=True)
    assert set(grid.asked) == {4}
    assert_same(tmp_path, unbroken)


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_says_so(
    tiny_base: Path, tmp_path: Path, unbroken: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = broken(tiny_base, tmp_path, 4)
    content = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(content[:-100])
    grid = Learners(tiny_base, crash=3)
    with pytest.raises(Crash):
        run_study(grid, config, MODALITY, resume=True)
    assert f"{NAME}'" in (said := capfd.readouterr().out)
    assert "after round 2" in said
    # and the whole one is not pushed out by the damaged one
    assert read_checkpoint(tmp_path).round == 2
    run_study(Learners(tiny_base), config, MODALITY, resume=True)
    assert_same(tmp_path, unbroken)


def test_any_changed_byte_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    drifts = {"p": torch.randn(4, 1, 1)}
    record: dict[str, Any] = {"round": 1}
    whole = Checkpoint(
        "study", "base", "modality", 1, {"a": torch.randn(6)}, [record], CollectedDrifts(drifts, {"p": 2.0})
    )
    write_checkpoint(tmp_path, whole)
    content = (tmp_path / NAME).read_bytes()
    unnoticed = []
    for place in range(len(content)):
        (tmp_path / NAME).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            read_checkpoint(tmp_path)
            unnoticed.append(place)
        except CheckpointError:
            pass
    assert unnoticed == []


def test_of_two_damaged_checkpoints_nothing_is_resumed(tiny_base: Path, tmp_path: Path) -> None:
    config = broken(tiny_base, tmp_path, 4)
    for name in (NAME, PREVIOUS):
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="restore"):
        run_study(Learners(tiny_base), config, MODALITY, resume=True)


def test_a_checkpoint_keeps_the_one_before(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write_checkpoint(tmp_path, Checkpoint("s", "b", "m", number, {"a": torch.full((2,), float(number))}, []))
    assert read_checkpoint(tmp_path).round == 3
    (tmp_path / NAME).unlink()
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert (found.checkpoint.round, found.damage) == (2, "")


@pytest.mark.parametrize("what", ["study", "base model", "modality"])
def test_another_studys_checkpoint_is_not_resumed(tiny_base: Path, tmp_path: Path, what: str) -> None:
    config, modality = broken(tiny_base, tmp_path, 3), MODALITY
    if what == "study":
        config = replace(config, seed=1)
    elif what == "modality":
        modality = replace(MODALITY, name="another")
    else:
        other = replace(read_checkpoint(tmp_path), base_digest="0" * 64)
        write_checkpoint(tmp_path, other)
    before = (tmp_path / NAME).read_bytes()
    with pytest.raises(FederationError, match=f"of another {what}") as raised:
        run_study(Learners(tiny_base), config, modality, resume=True)
    assert "\n" not in str(raised.value)
    assert (tmp_path / NAME).read_bytes() == before


def test_resuming_a_finished_study_writes_its_release_again(tiny_base: Path, tmp_path: Path, unbroken: Path) -> None:
    config = four_rounds(tiny_base, tmp_path)
    run_study(Learners(tiny_base), config, MODALITY)
    (tmp_path / "release" / ADAPTER).unlink()
    grid = Learners(tiny_base)
    run_study(grid, config, MODALITY, resume=True)
    assert grid.asked == []
    assert_same(tmp_path, unbroken)


def test_resuming_with_no_checkpoint_begins_and_says_so(
    tiny_base: Path, tmp_path: Path, unbroken: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_study(Learners(tiny_base), four_rounds(tiny_base, tmp_path), MODALITY, resume=True)
    assert "holds no checkpoint" in capfd.readouterr().out
    assert_same(tmp_path, unbroken)


def test_rounds_are_not_overwritten_by_who_forgot_to_resume(tiny_base: Path, tmp_path: Path) -> None:
    config = broken(tiny_base, tmp_path, 3)
    with pytest.raises(FederationError, match="--resume"):
        run_study(Learners(tiny_base), config, MODALITY, overwrite=False)
    assert read_checkpoint(tmp_path).round == 2


def test_a_simulation_begins_anew(tiny_base: Path, tmp_path: Path, unbroken: Path) -> None:
    config = broken(tiny_base, tmp_path, 3)
    grid = Learners(tiny_base)
    run_study(grid, config, MODALITY)
    assert set(grid.asked) == {1, 2, 3, 4}
    assert_same(tmp_path, unbroken)
    with pytest.raises(Crash):
        run_study(Learners(tiny_base, crash=1), config, MODALITY)
    assert find_checkpoint(tmp_path) is None  # nothing of the earlier run is left to be resumed by mistake


def test_a_folder_serves_one_run_at_a_time(tiny_base: Path, tmp_path: Path) -> None:
    config = broken(tiny_base, tmp_path, 3)
    with locked(tmp_path), pytest.raises(FederationError, match="another run"):
        run_study(Learners(tiny_base), config, MODALITY, resume=True)
    assert not (tmp_path / "failure.txt").exists()  # that is the other run's to write


def test_a_resumed_run_to_which_too_few_sites_come_loses_no_round(tiny_base: Path, tmp_path: Path) -> None:
    class Alone(Learners):
        def get_node_ids(self) -> Iterable[int]:
            return list(self.sites)[:1]

    config = broken(tiny_base, tmp_path, 3)
    with pytest.raises(FederationError, match="missing: q, r"):
        run_study(Alone(tiny_base), config, MODALITY, resume=True)
    assert read_checkpoint(tmp_path).round == 2
