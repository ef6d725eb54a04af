"""What `ld-server status` says, of runs that really happened."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from ld_common.core.errors import CheckpointError, FederationError
from ld_common.protocol import messages as wire
from ld_common.protocol.messages import TrainResult
from ld_common.protocol.site_keys import new_site_keys, public_keys
from ld_server.checkpoint import NAME, PREVIOUS
from ld_server.deployment.status import RunStatus, read_status
from ld_server.deployment.study_home import AdmittedSite
from ld_server.round_log import ROUNDS
from ld_server.server_app import run_study
from tests.server.test_strategy import MODALITY, LocalGrid, honest, load_channels, study

SITES = ["p", "q", "z"]
KEYS = public_keys(new_site_keys())
ADMITTED = {name: AdmittedSite(name, KEYS, "") for name in SITES}


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def fails_after_round_one(result: TrainResult) -> RecordDict:
    return wire.pack_result(result) if result.round == 1 else wire.pack_error("store")


def state_of(status: RunStatus) -> tuple[int, int, str]:
    return status.rounds_done, status.rounds, status.state


def test_a_study_that_never_ran(tiny_base: Path, tmp_path: Path) -> None:
    status = read_status(tmp_path, study(tiny_base, tmp_path, ["p", "q"]), ADMITTED)
    assert state_of(status) == (0, 2, "not running")
    assert [(site.name, site.last_round, site.admission) for site in status.sites] == [
        ("p", None, "admitted"),
        ("q", None, "admitted"),
    ]
    assert len(status.lines()) == 3


def test_who_is_not_admitted_and_who_is_revoked(tiny_base: Path, tmp_path: Path) -> None:
    revoked = {"p": AdmittedSite("p", KEYS, "", "2026-01-01")}
    status = read_status(tmp_path, study(tiny_base, tmp_path, ["p", "q"]), revoked)
    assert [site.admission for site in status.sites] == ["revoked 2026-01-01", "not admitted yet"]
    lines = status.lines()
    assert "2026-01-01" in lines[1]
    assert "not admitted" in lines[2]


def test_a_study_that_ended(tiny_base: Path, tmp_path: Path) -> None:
    config = study(tiny_base, tmp_path, SITES, rounds=4, clip_update_norm=0.8)
    channels = load_channels(tiny_base)
    run_study(LocalGrid({"p": honest, "q": honest, "z": fails_after_round_one}, channels), config, MODALITY)
    status = read_status(tmp_path, config, ADMITTED)
    assert state_of(status)[:2] == (4, 4)
    assert str(tmp_path / "release") in status.state
    assert status.last_round is not None
    assert (status.last_round.round, status.last_round.counted) == (4, True)
    p, q, z = status.sites
    assert (p.last_round, p.visits, p.patients) == (4, 10, 4)
    assert (p.clipped, q.clipped) == (False, True)  # moves by 0.01, by 0.03
    assert z.last_round == 1
    assert [(entry.site, entry.rounds) for entry in status.left_out] == [("z", [2, 3, 4])]
    assert status.left_out[0].reason == wire.ERROR_SENTENCES["store"]
    text = "\n".join(status.lines())
    assert "10 visits of 4 patients" in text
    assert "z, round 2-4:" in text
    assert json.loads(json.dumps(asdict(status)))["sites"][0]["name"] == "p"


def test_a_run_that_is_under_way_and_one_that_was_killed(tiny_base: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    during: list[RunStatus] = []
    config = study(tiny_base, tmp_path, ["p", "q"])

    class Dying(LocalGrid):
        def _reply(self, message: Message) -> Message | None:
            if message.metadata.message_type == "train" and wire.unpack_task(message.content).round == 2:
                during.append(read_status(tmp_path, config, ADMITTED))
                raise Killed
            return super()._reply(message)

    with pytest.raises(Killed):
        run_study(Dying({"p": honest, "q": honest}, load_channels(tiny_base)), config, MODALITY)
    assert state_of(during[0]) == (1, 2, "running")
    after = read_status(tmp_path, config, ADMITTED)
    assert after.rounds_done == 1
    assert "--resume" in after.state
    assert after.lines()[1:] == during[0].lines()[1:]
    edited = study(tiny_base, tmp_path, ["p", "q"], rounds=3)
    assert "another study" in read_status(tmp_path, edited, ADMITTED).notes[0]


def test_a_run_that_failed(tiny_base: Path, tmp_path: Path) -> None:
    config = study(tiny_base, tmp_path, ["p", "q"])
    with pytest.raises(FederationError):
        run_study(LocalGrid({"p": honest}, load_channels(tiny_base)), config, MODALITY)
    status = read_status(tmp_path, config, ADMITTED)
    assert status.rounds_done == 0
    assert status.state.startswith("failed: ")
    assert status.state.endswith("q")


def test_a_round_that_did_not_count(tiny_base: Path, tmp_path: Path) -> None:
    config = study(tiny_base, tmp_path, ["p", "q"])
    run_study(LocalGrid({"p": honest, "q": fails_after_round_one}, load_channels(tiny_base)), config, MODALITY)
    last = read_status(tmp_path, config, ADMITTED).last_round
    assert last is not None
    assert not last.counted
    assert "federation.min_train_nodes is 2" in last.failure


def test_a_damaged_checkpoint_is_noted_and_the_rounds_are_still_read(tiny_base: Path, tmp_path: Path) -> None:
    config = study(tiny_base, tmp_path, ["p", "q"])
    run_study(LocalGrid({"p": honest, "q": honest}, load_channels(tiny_base)), config, MODALITY)
    intact = read_status(tmp_path, config, ADMITTED)
    (tmp_path / NAME).write_bytes(b"damaged")
    status = read_status(tmp_path, config, ADMITTED)
    assert status.rounds_done == 1
    assert NAME in status.notes[0]
    (tmp_path / PREVIOUS).write_bytes(b"damaged")
    status = read_status(tmp_path, config, ADMITTED)
    assert (status.sites, status.rounds_done) == (intact.sites, intact.rounds_done)
    assert NAME in status.notes[0]
    assert PREVIOUS in status.notes[0]
    with (tmp_path / ROUNDS).open("a") as stream:
        stream.write('{"round": 3, "si')  # as a killed run leaves it
    assert read_status(tmp_path, config, ADMITTED) == status
    (tmp_path / ROUNDS).write_text("no round\n")
    with pytest.raises(CheckpointError, match=ROUNDS):
        read_status(tmp_path, config, ADMITTED)
