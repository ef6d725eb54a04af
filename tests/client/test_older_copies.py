"""A home whose files were put back from an older copy, and a store that changed during a study."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity

from ld_client import client_app as app
from ld_client.data.store import Store
from ld_client.deployment.approvals import check_bundle, last_approval
from ld_client.deployment.approve import approve, withdraw
from ld_client.deployment.audit_log import AuditLog, check_holds
from ld_client.deployment.cohort import renew_cohort
from ld_client.deployment.site_home import SiteHome
from ld_client.policy import rounded_count, rounded_drift
from ld_client.privacy.ledger import TRAINING, Ledger, Use
from ld_client.site_config import PolicyConfig
from ld_common.core.config import from_mapping
from ld_common.core.errors import ApprovalError, DeploymentError, PolicyError, PrivacyError
from ld_common.protocol import messages
from ld_common.protocol.study_config import StudyConfig
from tests.support.site_homes import approved, asked, make_home, node_of, task_of

OPTIONS = {
    "name": "demo",
    "adapter": {"name": "lora", "rank": 1, "targets": ["to_k"]},
    "training": {"steps": 1, "batch_size": 2},
    "drift": {"shape": "none"},
    "federation": {"rounds": 3, "sites": ["aster", "birch"]},
}


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def home(site_yaml: Path, tmp_path: Path) -> SiteHome:
    return make_home(tmp_path, site_yaml, from_mapping(StudyConfig, OPTIONS))


def trained(home: SiteHome) -> bool:
    """Whether a task of round 1 is answered by a result."""
    reply = app.app(asked(messages.pack_task(task_of(home)), "train"), node_of(home))
    return messages.unpack_error(reply.content) is None


@pytest.mark.slow
@pytest.mark.attack
def test_a_ledger_from_an_older_copy_is_refused(home: SiteHome) -> None:
    approved(home)
    ledger, older = home.site().ledger_path, home.path / "older"
    assert trained(home)
    shutil.copyfile(ledger, older)
    assert trained(home)
    newest = ledger.read_bytes()
    shutil.copyfile(older, ledger)
    assert not trained(home)
    ledger.unlink()
    assert not trained(home)
    ledger.write_bytes(newest)
    assert trained(home)


@pytest.mark.attack
def test_an_approval_that_was_withdrawn_does_not_come_back_with_an_older_file(home: SiteHome) -> None:
    approved(home)
    older, bundle = home.approvals.read_bytes(), home.kit().bundle_digest
    check_bundle(home, bundle)
    withdraw(home)
    home.approvals.write_bytes(older)
    with pytest.raises(ApprovalError, match="older copy"):
        check_bundle(home, bundle)
    assert not trained(home)
    approve(home)
    assert last_approval(home) is not None
    check_bundle(home, bundle)


@pytest.mark.attack
def test_an_approval_that_no_log_holds_does_not_count(home: SiteHome) -> None:
    approved(home)
    home.approvals.write_text(home.approvals.read_text().replace(home.kit().bundle_digest, "0" * 64))
    with pytest.raises(ApprovalError, match="audit log"):
        check_bundle(home, "0" * 64)


@pytest.mark.attack
def test_a_log_from_an_older_copy_lacks_the_head_that_the_server_holds(home: SiteHome) -> None:
    approved(home)
    older = home.audit_log.read_bytes()
    head = AuditLog.of(home).append("asked", {})
    check_holds(home.audit_log, head)
    task = task_of(home, audit_head=head)
    reply = app.app(asked(messages.pack_task(task), "train"), node_of(home))
    assert messages.unpack_error(reply.content) is None
    home.audit_log.write_bytes(older)
    AuditLog.of(home).append("asked", {})
    with pytest.raises(DeploymentError, match="lacks entry"):
        check_holds(home.audit_log, head)
    reply = app.app(asked(messages.pack_task(task), "train"), node_of(home))
    assert messages.unpack_error(reply.content) is not None


def use(cohort: str, number: int = 1) -> Use:
    return Use("demo", "a" * 64, number, {TRAINING: None}, cohort=cohort)


@pytest.mark.attack
def test_a_study_trains_on_the_data_of_its_first_round_until_a_person_lets_it_go_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.charge(use("before"), 1.0, 1e-5)
    with pytest.raises(PolicyError, match="ld-client cohort"):
        ledger.charge(use("after", 2), 1.0, 1e-5)
    ledger.charge(use("before", 2), 1.0, 1e-5)
    ledger.charge(replace(use("after"), study_digest="b" * 64), 1.0, 1e-5)
    with pytest.raises(PolicyError, match="2 studies begin with ''"):
        renew_cohort(ledger, "", None)
    assert "'demo' goes on" in renew_cohort(ledger, "aa", None)[0]
    ledger.charge(use("after", 3), 1.0, 1e-5)
    with pytest.raises(PolicyError, match="changed since"):
        ledger.charge(use("before", 3), 1.0, 1e-5)


def test_a_mark_holds_for_a_ledger_that_grew_and_for_no_other(tmp_path: Path) -> None:
    ledger, other = Ledger(tmp_path / "a.sqlite"), Ledger(tmp_path / "b.sqlite")
    for number in (1, 2):
        ledger.charge(use("x", number), 1.0, 1e-5)
    mark = ledger.mark()
    ledger.charge(use("x", 3), 1.0, 1e-5)
    ledger.check_mark(mark)
    other.charge(use("x", 1), 1.0, 1e-5)
    for shorter in (other, Ledger(tmp_path / "none.sqlite")):
        with pytest.raises(PrivacyError, match="older copy"):
            shorter.check_mark(mark)


def test_the_digest_of_a_store_is_of_its_visits() -> None:
    store = Store("b", "m", torch.zeros(2, 1, 2, 2), ["p", "q"], torch.zeros(1), ["x", "y"], [{}, {}], [0, 0])
    same = replace(store, base_digest="other", latents=store.latents.clone())
    assert store.digest() == same.digest()
    changes = {"latents": store.latents + 1e-6, "days": [0, 1], "pseudonyms": ["x", "x"], "prompts": ["p", "p"]}
    assert len({replace(store, **{name: value}).digest() for name, value in changes.items()} | {store.digest()}) == 5


def test_counts_and_drift_leave_in_steps() -> None:
    policy = PolicyConfig()
    assert [rounded_count(policy, count) for count in (1, 10, 12, 13, 104)] == [5, 10, 10, 15, 105]
    assert rounded_count(PolicyConfig(count_step=1), 12) == 12
    drift = torch.tensor([0.1234, -0.4])
    assert torch.equal(rounded_drift(policy, drift) * 64, torch.tensor([8.0, -26.0]))
    assert torch.equal(rounded_drift(PolicyConfig(drift_step=0.0), drift), drift)
