"""`ld-server status --follow` beside a run, as somebody types it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ld_common.core.errors import DeploymentError
from ld_server.cli import app
from ld_server.deployment import watched_run
from ld_server.deployment.watched_run import WatchedRun, follow, round_line
from ld_server.round_log import FAILURE, RoundRecord, append_round, locked, read_rounds, write_rounds
from ld_server.tracking.run_study import RUN_STUDY, write_run_study
from tests.server.test_strategy import study
from tests.support.commands import start_command
from tests.support.deployed_study import DeployedStudy

BRAIN_MRI = Path(__file__).parents[2] / "configs/modalities/brain_mri.yaml"


def record(number: int, **changes: object) -> RoundRecord:
    entry = {"visits": 10, "patients": 4, "loss_first": 1.0, "loss_last": 0.5, "seconds": 1.0, "uplink_bytes": 64}
    site = {**entry, "update_norm": 0.1, "clipped": False, "drift": None}
    whole = RoundRecord(number, {"p": site, "q": site}, counted=True, ended=f"2026-01-01T00:0{number}:00+00:00")
    vars(whole).update(changes)
    return whole


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path) -> Path:
    """The folder of a run with one round."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_run_study(folder, study(tiny_base, folder, ["p", "q"], rounds=3))
    write_rounds(folder, [record(1)])
    return folder


@contextmanager
def following(place: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "ld_server.cli", "status", str(place), "--follow", *options]
    process = start_command(command)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def lines(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().rstrip("\n") for _ in range(count)]


@pytest.fixture
def running(run: Path) -> Iterator[ExitStack]:
    """The run is under way until this is closed."""
    with ExitStack() as held:
        held.enter_context(locked(run))
        yield held


@pytest.mark.slow
def test_each_round_is_a_line_as_it_ends_and_the_end_of_the_run_ends_it(run: Path, running: ExitStack) -> None:
    with following(run) as process:
        assert lines(process, 4)[0] == "study test: round 1 of 3, running"
        append_round(run, record(2, left_out={"z": "it was not connected"}))
        assert lines(process, 1) == ["round 2 in 0 s: p loss 0.5, q loss 0.5; left out z: it was not connected"]
        append_round(run, record(3, validation_mean={"loss": 0.25, "visits": 9.0}, counted=False, failure="too few"))
        (run / FAILURE).write_text("the disk is full")
        running.close()
        out, err = process.communicate(timeout=20)
    assert out.splitlines() == [
        "round 3 in 0 s: p loss 0.5, q loss 0.5; validation loss 0.25; not counted: too few",
        "study test: round 3 of 3, failed: the disk is full",
    ]
    assert (err, process.returncode) == ("", 0)


@pytest.mark.slow
@pytest.mark.usefixtures("running")
def test_ctrl_c_is_quiet(run: Path) -> None:
    with following(run) as process:
        lines(process, 4)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (out, err, process.returncode) == ("", "", 0)


@pytest.mark.slow
def test_json_is_an_object_a_line(run: Path, running: ExitStack) -> None:
    with following(run, "--json") as process:
        (first,) = lines(process, 1)
        append_round(run, record(2))
        running.close()
        out, _ = process.communicate(timeout=20)
    begun, second, end = (json.loads(line) for line in [first, *out.splitlines()])
    assert (begun["state"], begun["rounds_done"]) == ("running", 1)
    assert (second["round"], second["sites"]["p"]["loss_last"]) == (2, 0.5)
    assert end["rounds_done"] == 2
    assert end["state"].startswith("stopped")


@pytest.mark.slow
def test_a_run_that_begins_soon_is_waited_for(run: Path) -> None:
    with following(run) as process:
        assert lines(process, 1) == [
            "study test: round 1 of 3, stopped before its end: continue by the command that began it"
        ]
        assert lines(process, 4)[3].startswith("waits up to 60 s")
        with locked(run):
            append_round(run, record(2))
            assert lines(process, 1) == ["round 2 in 0 s: p loss 0.5, q loss 0.5"]
        out, err = process.communicate(timeout=20)
    assert (out.count("\n"), err, process.returncode) == (1, "", 0)


def test_a_run_that_does_not_begin_is_waited_for_so_long_only(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_run, "START_SECONDS", 0.1)
    shown = CliRunner().invoke(app, ["status", str(run), "--follow"])
    assert (shown.exit_code, shown.output.splitlines()[-1]) == (0, "waits up to 0.1 s for a run to begin")


def test_a_run_that_ended_is_shown_once(run: Path) -> None:
    (run / "release").mkdir()
    released = [vars(entry) for entry in read_rounds(run)]
    (run / "release/manifest.json").write_text(json.dumps({"rounds": released}))
    shown = CliRunner().invoke(app, ["status", str(run), "--follow"])
    assert shown.exit_code == 0
    assert "ended after 1 of 3 rounds, its release is" in shown.output
    assert "waits" not in shown.output
    append_round(run, record(2))  # of a run that began anew: the release is not of these rounds
    assert "stopped" in CliRunner().invoke(app, ["status", str(run)]).output


@pytest.mark.slow
def test_rounds_of_a_log_that_is_written_anew_are_shown_again(run: Path, running: ExitStack) -> None:
    """As when a run is resumed from the checkpoint before the last."""
    seen = follow(WatchedRun.find(run), 0)
    assert next(seen).round == 1
    append_round(run, record(2))
    assert next(seen).round == 2
    write_rounds(run, [record(1)])
    append_round(run, record(2, seconds=7.0))
    append_round(run, record(3))
    assert next(seen).round == 3
    running.close()
    assert list(seen) == []


def test_a_home_a_run_and_a_simulation_s_folder_are_found(run: Path, tmp_path: Path) -> None:
    assert WatchedRun.find(run) == WatchedRun(run)
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "study").symlink_to(run)
    assert WatchedRun.find(demo).study().name == "test"
    deployed = DeployedStudy(tmp_path / "deployed", "net", BRAIN_MRI)
    found = WatchedRun.find(deployed.home.path)
    assert (found.folder, found.study().name) == (deployed.home.run, "net")
    for wrong in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DeploymentError, match="ld-server provision"):
            WatchedRun.find(wrong)
    (run / RUN_STUDY).write_text("{")
    with pytest.raises(DeploymentError, match="resume"):
        WatchedRun.find(run).study()


def test_a_round_without_a_site_is_a_line_too() -> None:
    assert (
        round_line(RoundRecord(4, failure="no site connected"))
        == "round 4 in 0 s: no site; not counted: no site connected"
    )
