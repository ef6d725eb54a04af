"""What `ld-server status` says, of runs that really happened."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from ld_common.core.errors import CheckpointError, FederationError
from ld_common.protocol import messages as wire
from ld_common.protocol.messages import TrainResult
from ld_server.checkpoint import NAME, PREVIOUS
from ld_server.deployment.status import status_lines
from ld_server.deployment.study_home import AdmittedSite
from ld_server.round_log import ROUNDS
from ld_server.server_app import run_study
from tests.server.test_strategy import MODALITY, LocalGrid, honest, load_channels, study

SITES = ["p", "q", "z"]
ADMITTED = {name: AdmittedSite(name, "", "") for name in SITES}


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def fails_after_round_one(result: TrainResult) -> RecordDict:
    return wire.pack_result(result) if result.round == 1 else wire.pack_error("store")


def test_a_study_that_never_ran(tiny_base: Path, tmp_path: Path) -> None:
    assert status_lines(tmp_path, study(tiny_base, tmp_path, ["p", "q"]), ADMITTED) == [
        "study test: round 0 of 2, not running",
        "  p: no good answer yet",
        "  q: no good answer yet",
    ]


def test_who_is_not_admitted_and_who_is_revoked(tiny_base: Path, tmp_path: Path) -> None:
    revoked = {"p": AdmittedSite("p", "", "", "2026-01-01")}
    assert status_lines(tmp_path, study(tiny_base, tmp_path, ["p", "q"]), revoked)[1:] == [
        "  p: no good answer yet; revoked 2026-01-01",
        "  q: no good answer yet; not admitted yet",
    ]


def test_a_study_that_ended(tiny_base: Path, tmp_path: Path) -> None:
    own = study(tiny_base, tmp_path, SITES, rounds=4, clip_update_norm=1.5)
    channels = load_channels(tiny_base)
    run_study(LocalGrid({"p": honest, "q": honest, "z": fails_after_round_one}, channels), own, MODALITY)
    head, last, p, q, z, left, why = status_lines(tmp_path, own, ADMITTED)
    assert head == f"study test: round 4 of 4, ended, its release is {tmp_path / 'release'}"
    assert last.startswith("round 4 ended 20")
    assert last.endswith("and counted")
    assert p.startswith("  p: last in round 4, 20")
    assert p.endswith(", 10 visits of 4 patients")
    assert "clipped" not in p  # moves by 0.01, q by 0.03
    assert "clipped" in q
    assert z.startswith("  z: last in round 1, 20")
    assert left == "left out:"
    assert why == f"  z, round 2-4: {wire.ERROR_SENTENCES['store']}"


def test_a_run_that_is_under_way_and_one_that_was_killed(tiny_base: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    said: list[list[str]] = []
    own = study(tiny_base, tmp_path, ["p", "q"])

    class Dying(LocalGrid):
        def _reply(self, message: Message) -> Message | None:
            if message.metadata.message_type == "train" and wire.unpack_task(message.content).round == 2:
                said.append(status_lines(tmp_path, own, ADMITTED))
                raise Killed
            return super()._reply(message)

    with pytest.raises(Killed):
        run_study(Dying({"p": honest, "q": honest}, load_channels(tiny_base)), own, MODALITY)
    assert said[0][0] == "study test: round 1 of 2, running"
    after = status_lines(tmp_path, own, ADMITTED)
    assert after[0] == "study test: round 1 of 2, stopped before its end: go on with --resume"
    assert after[1:] == said[0][1:]
    edited = study(tiny_base, tmp_path, ["p", "q"], rounds=3)
    assert "of another study than this one" in status_lines(tmp_path, edited, ADMITTED)[1]


def test_a_run_that_failed(tiny_base: Path, tmp_path: Path) -> None:
    own = study(tiny_base, tmp_path, ["p", "q"])
    with pytest.raises(FederationError):
        run_study(LocalGrid({"p": honest}, load_channels(tiny_base)), own, MODALITY)
    assert status_lines(tmp_path, own, ADMITTED)[0] == (
        "study test: round 0 of 2, failed: only 1 of 2 sites came within 0.1 s; missing: q"
    )


def test_a_round_that_did_not_count_and_a_private_sites_numbers(tiny_base: Path, tmp_path: Path) -> None:
    own = study(tiny_base, tmp_path, ["p", "q"])
    run_study(LocalGrid({"p": honest, "q": fails_after_round_one}, load_channels(tiny_base)), own, MODALITY)
    assert status_lines(tmp_path, own, ADMITTED)[1].endswith(
        "did not count: 1 good answers came, federation.min_train_nodes is 2"
    )


def test_a_damaged_checkpoint_is_said_and_the_rounds_are_read_all_the_same(tiny_base: Path, tmp_path: Path) -> None:
    own = study(tiny_base, tmp_path, ["p", "q"])
    run_study(LocalGrid({"p": honest, "q": honest}, load_channels(tiny_base)), own, MODALITY)
    whole = status_lines(tmp_path, own, ADMITTED)
    (tmp_path / NAME).write_bytes(b"damaged")
    head, note, *_ = status_lines(tmp_path, own, ADMITTED)
    assert head.startswith("study test: round 1 of 2")
    assert NAME in note
    (tmp_path / PREVIOUS).write_bytes(b"damaged")
    head, note, *rest = status_lines(tmp_path, own, ADMITTED)
    assert [head, *rest] == whole
    assert NAME in note
    assert PREVIOUS in note
    with (tmp_path / ROUNDS).open("a") as stream:
        stream.write('{"round": 3, "si')  # a run that was killed at that
    assert status_lines(tmp_path, own, ADMITTED) == [head, note, *rest]
    (tmp_path / ROUNDS).write_text("no round\n")
    with pytest.raises(CheckpointError, match="resume the run"):
        status_lines(tmp_path, own, ADMITTED)
