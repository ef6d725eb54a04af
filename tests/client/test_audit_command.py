"""`ld-client audit-privacy` from a site's scans and a release to what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from ld_client.audit.command import audit_lines, run_audit
from ld_client.audit.run import AuditOptions
from ld_client.audit.statistics import AuditError
from ld_client.data.store import open_store, split_store
from ld_client.data.store_key import write_key
from ld_client.round import handle_train
from ld_client.site_config import SiteConfig, load_modality, load_site
from ld_common.core.config import from_mapping
from ld_common.protocol import messages as wire
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import read_release
from ld_server.server_app import run_study
from tests.conftest import write_table, write_visit
from tests.server.test_strategy import LocalGrid
from tests.support.site_homes import index_site

PATIENTS = [f"PLANTED-{number}" for number in range(8)]
OPTIONS = AuditOptions(points=2, generated=4, canaries=8)


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class RealSites(LocalGrid):
    """Nodes that answer as two sites with one store."""

    def __init__(self, site: SiteConfig) -> None:
        super().__init__({name: wire.pack_result for name in ("p", "q")}, 4)
        self.site = site

    def _reply(self, message: Message) -> Message | None:
        name, _ = self.sites[message.metadata.dst_node_id]
        if message.metadata.message_type.startswith(("query", "evaluate")):
            return super()._reply(message)
        task = wire.unpack_task(message.content)
        content = wire.pack_result(handle_train(replace(self.site, site=name), task))
        return Message(content, reply_to=message)


@pytest.fixture
def audited(site_yaml: Path, tiny_base: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A site that holds patients back, and a release that it took part in."""
    rows = []
    for number, patient in enumerate(PATIENTS):
        write_visit(site_yaml.parent / "scans", patient, "2020-01-01", PatientBirthDate=f"{1960 - number}0101")
        rows.append(f"{patient},2020-01-01,{60 + number},Female,Normal")
    write_table(site_yaml, rows)
    site = load_site(site_yaml, ["held_out=0.5"])
    write_key(site.store_path, bytes(32))
    index_site(site)
    options: dict[str, Any] = {
        "base_model": str(tiny_base),
        "output": str(tmp_path / "study"),
        "adapter": {"name": "lora", "rank": 1, "targets": ["to_k"]},
        "training": {"steps": 2, "batch_size": 2},
        "federation": {"rounds": 1, "sites": ["p", "q"], "wait_seconds": 1},
    }
    return site_yaml, run_study(RealSites(site), from_mapping(StudyConfig, options), load_modality(site))


@pytest.mark.slow
def test_an_audit_compares_members_with_those_held_out(audited: tuple[Path, Path], tmp_path: Path) -> None:
    site = replace(load_site(audited[0], ["held_out=0.5"]), site="p")
    members, held_out = split_store(open_store(site.store_path), 0.5)
    release = read_release(audited[1])
    assert release.manifest["rounds"][0]["sites"]["p"]["patients"] == len(set(members.pseudonyms)) < len(PATIENTS)
    stages: dict[str, tuple[int, int]] = {}
    audit = run_audit(site, release, tmp_path / "audit", OPTIONS, lambda *now: stages.update({now[0]: now[1:]}))
    assert set(stages) == {"membership", "drawing", "rehearsal", "canaries"}
    assert all(done == total for done, total in stages.values())
    text = "\n".join(audit_lines(audit))
    assert "without differential privacy" in text
    assert f"{members.patients} patients trained on, {held_out.patients} held out" in text
    assert (members.patients, held_out.patients) == (4, 4)
    file = tmp_path / "audit/audit.json"
    assert file.stat().st_mode & 0o077 == 0
    found = json.loads(file.read_text())
    assert found["adapter_sha256"] == release.adapter_sha256
    assert len(found["membership"]) == 2
    assert found["canaries"]["delta"] == 0.0
    assert "PLANTED" not in file.read_text()


def test_a_site_that_holds_nobody_back_is_told_to(audited: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(AuditError, match=r"held_out is 0"):
        run_audit(load_site(audited[0]), read_release(audited[1]), tmp_path / "audit", OPTIONS, lambda *_: None)
