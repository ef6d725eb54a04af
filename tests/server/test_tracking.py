"""Where a run's numbers go: each round once, whatever was killed, and no tracker ends a run."""

from __future__ import annotations

import csv
import struct
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ld_common.core.errors import ConfigError, FederationError
from ld_common.protocol import messages as wire
from ld_common.protocol.study_config import StudyConfig
from ld_server.checkpoint import NAME
from ld_server.round_log import FAILURE, RELEASE, RoundRecord, read_rounds
from ld_server.server_app import run_study
from ld_server.tracking.base import SENT, RemoteTracker
from ld_server.tracking.numbers import round_numbers
from ld_server.tracking.rounds_csv import COLUMNS, ROUNDS_CSV, RoundsCsv
from ld_server.tracking.tensorboard_files import FOLDER, TensorboardFiles
from ld_server.tracking.tracking import Tracking
from ld_server.tracking.wandb_run import ERROR_REPORTING, FOLDERS
from tests.server.test_strategy import MODALITY, LocalGrid, honest, load_channels, study

PRIVATE = {"visits": None, "patients": None, "loss_first": None, "loss_last": None, "seconds": None, "coverage": None}


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Killed(BaseException):
    """As a process that is killed in a round leaves its files."""


class Dying(LocalGrid):
    """Sites whose server is killed in a round."""

    dies_in = 2

    def _reply(self, message: Message) -> Message | None:
        if message.metadata.message_type == "train" and wire.unpack_task(message.content).round == self.dies_in:
            raise Killed
        return super()._reply(message)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / ROUNDS_CSV).open(newline="") as stream:
        return list(csv.DictReader(stream))


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's own reading of its files."""
    read = EventAccumulator(str(folder / FOLDER), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def two_sites(tiny_base: Path, kind: type[LocalGrid] = LocalGrid) -> LocalGrid:
    return kind({"p": honest, "q": honest}, load_channels(tiny_base))


def run_twice(tiny_base: Path, config: StudyConfig) -> None:
    """A run that is killed in round 2, and resumed to its end."""
    with pytest.raises(Killed):
        run_study(two_sites(tiny_base, Dying), config, MODALITY)
    run_study(two_sites(tiny_base), config, MODALITY, resume=True)


def test_a_run_leaves_a_line_a_round_and_site_and_the_same_numbers_for_tensorboard(
    tiny_base: Path, tmp_path: Path
) -> None:
    config = study(tiny_base, tmp_path, ["p", "q", "z"])
    sites = {"p": honest, "q": honest, "z": lambda result: wire.pack_error("store")}
    run_study(LocalGrid(sites, load_channels(tiny_base)), config, MODALITY)
    lines = rows(tmp_path)
    assert tuple(lines[0]) == COLUMNS
    assert [(line["round"], line["site"]) for line in lines] == [(n, s) for n in ("1", "2") for s in ("p", "q", "z")]
    p, _, z = lines[:3]
    assert (p["visits"], p["loss_first"], p["loss_last"], p["round_counted"]) == ("10", "1.0", "0.5", "1")
    assert (z["left_out"], z["loss_last"]) == (wire.ERROR_SENTENCES["store"], "")
    record = read_rounds(tmp_path)[1]
    drawn = curves(tmp_path)
    assert drawn["mean/loss_last"] == [(1, 0.5), (2, 0.5)]
    assert drawn["round/left_out"] == [(1, 1.0), (2, 1.0)]
    assert drawn["update_norm/p"][1] == (2, pytest.approx(record.sites["p"]["update_norm"], rel=1e-6))
    assert drawn["uplink_bytes/q"][1] == (2, record.sites["q"]["uplink_bytes"])
    assert not any(name.endswith("/z") for name in drawn)


def test_after_a_resume_the_files_hold_each_round_once(tiny_base: Path, tmp_path: Path) -> None:
    run_twice(tiny_base, study(tiny_base, tmp_path, ["p", "q"], rounds=3))
    assert [(line["round"], line["site"]) for line in rows(tmp_path)] == [(n, s) for n in "123" for s in "pq"]
    drawn = curves(tmp_path)
    assert {tag: [step for step, _ in points] for tag, points in drawn.items()} == {tag: [1, 2, 3] for tag in drawn}
    assert len(list((tmp_path / FOLDER).iterdir())) == 1


def test_a_tracker_that_is_not_installed_is_named_with_its_package_before_any_site_is_asked(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nobody(LocalGrid):
        def get_node_ids(self) -> list[int]:
            raise AssertionError("a site was looked for")

    for name in ("mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
        config = replace(study(tiny_base, tmp_path / name, ["p", "q"]), trackers=[name])
        with pytest.raises(ConfigError, match=rf"'{name}'.*pip install '{name}"):
            run_study(two_sites(tiny_base, Nobody), config, MODALITY)
        assert "pip install" in (tmp_path / name / FAILURE).read_text()


def test_an_unknown_tracker_is_refused_with_the_known_ones(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mlflow, wandb"):
        replace(study(tiny_base, tmp_path, ["p", "q"]), trackers=["tensorboard"])


def test_a_tracker_that_fails_is_one_line_and_not_the_end_of_the_run(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Blocking(LocalGrid):
        """Makes the file of the rounds unwritable in round 2."""

        def _reply(self, message: Message) -> Message | None:
            if message.metadata.message_type == "train" and wire.unpack_task(message.content).round == 2:
                (tmp_path / ROUNDS_CSV).rename(tmp_path / "moved away")
                (tmp_path / ROUNDS_CSV / "in the way").mkdir(parents=True)
                self._reply = super()._reply  # type: ignore[method-assign]
            return super()._reply(message)

    (tmp_path / FOLDER).write_text("in the way")
    config = study(tiny_base, tmp_path, ["p", "q"], rounds=3)
    run_study(two_sites(tiny_base, Blocking), config, MODALITY)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tracker ")]
    assert [line.split(" and is off")[0] for line in said] == [
        "tracker tensorboard failed at the start",
        "tracker csv failed in round 2",
    ]
    assert (tmp_path / RELEASE / "manifest.json").exists()
    assert len(read_rounds(tmp_path)) == 3


def test_a_run_that_fails_ends_its_trackers(tiny_base: Path, tmp_path: Path) -> None:
    config = study(tiny_base, tmp_path, ["p", "q"])
    refusing = LocalGrid(dict.fromkeys("pq", lambda result: wire.pack_error("policy")), load_channels(tiny_base))
    with pytest.raises(FederationError):
        run_study(refusing, config, MODALITY)
    assert [line["round_counted"] for line in rows(tmp_path)] == ["0"] * 4
    assert curves(tmp_path)["round/counted"] == [(1, 0.0), (2, 0.0)]


def private_record(number: int) -> RoundRecord:
    entry = {**PRIVATE, "update_norm": None, "clipped": None, "uplink_bytes": 8, "drift": None}
    return RoundRecord(number, {"p": entry}, counted=True, mean_update_norm=0.25, ended="2026-01-01T00:00:00+00:00")


def test_what_a_study_withholds_is_tracked_nowhere(tiny_base: Path, tmp_path: Path) -> None:
    numbers = round_numbers(private_record(1))
    assert set(numbers) == {f"round/{key}" for key in ("counted", "seconds", "sites", "left_out", "uplink_bytes")} | {
        "mean/update_norm",
        "uplink_bytes/p",
    }
    config = study(tiny_base, tmp_path, ["p", "q"])
    for tracker in (RoundsCsv(config, tmp_path), TensorboardFiles(config, tmp_path)):
        tracker.begin([private_record(1)])
        tracker.end(failed=False)
    assert set(curves(tmp_path)) == set(numbers)
    line = rows(tmp_path)[0]
    assert {name for name in COLUMNS if line[name]} == {
        "round",
        "site",
        "ended",
        "round_seconds",
        "round_counted",
        "uplink_bytes",
    }


def test_validations_are_tracked(tiny_base: Path, tmp_path: Path) -> None:
    record = replace(
        private_record(1),
        validation={"p": {"loss": 0.2, "visits": 10.0, "pairs": 5.0, "followup_gain_db": 1.5}},
        validation_mean={"loss": 0.2, "visits": 10.0},
        not_validated={"q": "the site holds out no patients"},
    )
    numbers = round_numbers(record)
    assert (numbers["validation_loss/p"], numbers["mean/validation_loss"]) == (0.2, 0.2)
    tracker = RoundsCsv(study(tiny_base, tmp_path, ["p", "q"]), tmp_path)
    tracker.begin([])
    tracker.add(record)
    p, q = rows(tmp_path)
    assert (p["validation_loss"], p["validation_visits"], p["validation_followup_gain_db"]) == ("0.2", "10.0", "1.5")
    assert (q["not_validated"], q["validation_loss"]) == ("the site holds out no patients", "")


class Listed(RemoteTracker):
    """A tracker elsewhere that keeps what it was sent."""

    name = "listed"
    elsewhere: dict[str, list[int]]

    def open(self, run: str | None) -> str:
        run = run or f"run {len(self.elsewhere) + 1}"
        self.elsewhere.setdefault(run, [])
        self._numbers = self.elsewhere[run]
        return run

    def send(self, record: RoundRecord) -> None:
        self._numbers.append(record.round)

    def end(self, failed: bool) -> None: ...


def records(count: int) -> list[RoundRecord]:
    return [private_record(number) for number in range(1, count + 1)]


def listed(config: StudyConfig, folder: Path, elsewhere: dict[str, list[int]]) -> Listed:
    tracker = Listed(config, folder)
    tracker.elsewhere = elsewhere
    return tracker


@pytest.mark.parametrize(
    ("before", "sent", "elsewhere"),
    [
        (2, {"run 1": [1, 2, 3]}, "the run that it continues"),
        (3, {"run 1": [1, 2, 3]}, "killed after a round was kept and before it was sent"),
        (1, {"run 1": [1, 2], "run 2": [1, 2]}, "resumed from an older checkpoint"),
        (0, {"run 1": [1, 2], "run 2": [1]}, "begun anew"),
    ],
)
def test_another_place_gets_each_round_once(
    tiny_base: Path, tmp_path: Path, before: int, sent: dict[str, list[int]], elsewhere: str
) -> None:
    config, kept = study(tiny_base, tmp_path, ["p", "q"]), dict[str, list[int]]()
    first = listed(config, tmp_path, kept)
    first.begin([])
    for record in records(2):
        first.add(record)
    second = listed(config, tmp_path, kept)
    second.begin(records(before))
    if before < 3:
        second.add(private_record(before + 1))
    assert kept == sent, elsewhere


def test_another_study_in_the_same_folder_is_another_run(tiny_base: Path, tmp_path: Path) -> None:
    kept: dict[str, list[int]] = {}
    for rounds in (2, 3):
        tracker = listed(study(tiny_base, tmp_path, ["p", "q"], rounds=rounds), tmp_path, kept)
        tracker.begin(records(1))
    assert kept == {"run 1": [1], "run 2": [1]}


def test_what_a_tracker_notes_may_be_damaged(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / SENT).write_text("no JSON")
    tracking = Tracking([listed(study(tiny_base, tmp_path, ["p", "q"]), tmp_path, {})])
    tracking.begin(records(1))
    tracking.add(private_record(2))
    tracking.end(failed=False)
    assert capsys.readouterr().out.count("tracker listed failed at the start") == 1


def test_a_damaged_checkpoint_does_not_double_a_round(tiny_base: Path, tmp_path: Path) -> None:
    config = study(tiny_base, tmp_path, ["p", "q"], rounds=3)
    run_study(two_sites(tiny_base), config, MODALITY)
    (tmp_path / NAME).write_bytes(b"damaged")
    run_study(two_sites(tiny_base), config, MODALITY, resume=True)  # from round 2 on
    assert [line["round"] for line in rows(tmp_path)] == ["1", "1", "2", "2", "3", "3"]
    assert [step for step, _ in curves(tmp_path)["round/seconds"]] == [1, 2, 3]


def test_mlflow_has_each_round_once_and_stays_in_the_folder(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "run"
    run_twice(tiny_base, replace(study(tiny_base, output, ["p", "q"], rounds=3), trackers=["mlflow"]))
    client = MlflowClient(tracking_uri=f"sqlite:///{output / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "test"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["federation.rounds"] == "3"
    assert "base_model" not in run.data.params
    history = client.get_metric_history(run.info.run_id, "mean/loss_last")
    assert sorted((point.step, point.value) for point in history) == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_and_biases_has_each_round_once_and_sends_nothing(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", ERROR_REPORTING, *FOLDERS):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    output = tmp_path / "run"
    run_twice(tiny_base, replace(study(tiny_base, output, ["p", "q"], rounds=3), trackers=["wandb"]))
    files = sorted((output / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2  # a session each time, of one run
    assert len({file.stem for file in files}) == 1
    steps = [step for file in files for step in logged_steps(file)]
    assert steps == [1, 2, 3]


def logged_steps(file: Path) -> Sequence[int]:
    """The steps of the history in W&B's own file, a log as LevelDB writes it: blocks of records after a head."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole, steps = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # complete
            record, whole = Record.FromString(whole), b""
            values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            steps += [int(values["_step"])] if values else []
    return steps
