"""A deployed study as real processes on loopback: TLS, keys, approvals; killed, resumed, released and pulled."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ld_client.deployment.audit_verify import verify_home
from ld_client.deployment.pull import pull
from ld_client.privacy.ledger import Ledger
from ld_common.core.errors import DeploymentError
from ld_common.release.release import ADAPTER
from ld_common.release.signature import check_release
from ld_server.deployment.provision import revoke
from ld_server.deployment.releases import run_release
from ld_server.deployment.watched_run import WatchedRun
from ld_server.round_log import read_rounds
from ld_simulations.benchmarks.deployment.rounds import run_to_release
from ld_simulations.benchmarks.deployment.stage import Deployment
from tests.support.two_hospitals import SITES, two_hospitals


@pytest.fixture
def stage(site_yaml: Path, tmp_path: Path) -> Iterator[Deployment]:
    """Two hospitals, admitted, approving; their nodes not started."""
    deployment = two_hospitals(site_yaml, tmp_path)
    with deployment.served():
        yield deployment


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_study_is_deployed_killed_resumed_released_and_pulled(stage: Deployment) -> None:
    adapter = run_to_release(stage, kill_after_round=1)
    rounds = read_rounds(stage.home.run)
    assert [record.round for record in rounds] == [1, 2]
    assert all(list(record.sites) == SITES and record.counted for record in rounds)
    for site in stage.sites.values():
        assert not verify_home(site).problems
        trained = [entry.round for entry in Ledger(site.site().ledger_path).entries()]
        assert {1, 2} <= set(trained)  # a round that was under way when the server died is charged again
        events = [json.loads(line) for line in site.audit_log.read_text().splitlines()]
        assert {event["details"]["bundle"] for event in events if event["event"] == "asked"} == {
            site.kit().bundle_digest
        }
        left = [event["details"] for event in events if event["event"] == "left"]
        assert {1, 2} <= {details["round"] for details in left}

    check_logs(stage)

    run_release(stage.home.path, ["aster"], None)
    pull(stage.sites["aster"], "", stage.folder / "pulled")
    key = stage.home.key("study").public_key()
    assert check_release(stage.folder / "pulled", [key])["study_digest"] == stage.home.study()[0].digest()
    assert (stage.folder / "pulled" / ADAPTER).read_bytes() == adapter

    revoke(stage.home, "aster")
    with pytest.raises(DeploymentError, match="revoked"):
        pull(stage.sites["aster"], "", stage.folder / "again")


def check_logs(stage: Deployment) -> None:
    """What Flower logged stands in its file once, without escape codes, and so do the rounds' numbers."""
    run, home = stage.home.run, stage.home.path
    logs = [run / "flower.log", home / "link.log", *(site.path / "node.log" for site in stage.sites.values())]
    texts = [log.read_text() for log in logs]
    assert not any("\x1b" in text for text in texts)
    assert [text.count("Starting Flower SuperNode") > 0 for text in texts] == [False, False, True, True]
    assert texts[0].count("[ROUND 1/2]") == 1
    assert texts[0].count("study deployed: 2 rounds at aster, birch") == 1
    assert "[ROUND" not in texts[1]
    assert texts[1].count("Starting Flower SuperLink") == 2  # it was killed once
    with (run / "rounds.csv").open(newline="") as stream:
        assert [(row["round"], row["site"]) for row in csv.DictReader(stream)] == [(n, s) for n in "12" for s in SITES]
    status = WatchedRun.find(home).status()
    assert (status.ended, status.rounds_done) == (True, 2)
