"""The ledger never under-counts: refusals, races, kills, and everything that a private site sends."""

from __future__ import annotations

import json
import multiprocessing
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from ld_client import client_app as app
from ld_client.data.store import open_store
from ld_client.deployment.audit_recorder import AuditRecorder
from ld_client.drift_report import report_drift
from ld_client.privacy.budget import read_budget
from ld_client.privacy.dp_drift import noised_drift
from ld_client.privacy.ledger import Ledger, NoisedRelease, Use, private_charges
from ld_client.site_config import load_site
from ld_common.core.config import from_mapping
from ld_common.core.errors import PolicyError, PrivacyError
from ld_common.protocol import messages
from ld_common.protocol.dp_accounting import Charge, epsilon
from ld_common.protocol.messages import TrainTask
from ld_common.protocol.study_config import StudyConfig
from ld_simulations.benchmarks.privacy.kills import kill_rounds, small_task
from tests.support.site_homes import approved, index_site, make_home

DELTA = 1e-5
STEP = Charge(2.0, 0.1, 10)
LIMIT = epsilon([STEP] * 2, DELTA) + 1e-6
"""Enough for two, not for three."""


def use(round_number: int = 1, charge: Charge | None = STEP) -> Use:
    return Use("study", "0" * 64, round_number, {"training": charge})


def test_charges_add_up_and_the_one_too_many_is_refused_with_the_numbers(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert ledger.entries() == []
    assert ledger.charge(use(), LIMIT, DELTA) == pytest.approx(epsilon([STEP], DELTA))
    assert ledger.charge(use(), LIMIT, DELTA) == pytest.approx(LIMIT, abs=1e-5)  # the same round, charged again
    with pytest.raises(PrivacyError, match=rf"from {LIMIT:.3g} to .* above this site's limit {LIMIT:g}"):
        ledger.charge(use(2), LIMIT, DELTA)
    assert [entry.round for entry in ledger.entries()] == [1, 1]
    assert ledger.path.stat().st_mode & 0o077 == 0


def test_a_use_without_privacy_is_written_down_and_has_no_epsilon(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert ledger.charge(use(charge=None), 0.0, DELTA) == 0.0
    assert [entry.charge for entry in ledger.entries()] == [None]
    assert private_charges(ledger.entries()) == []


def test_a_file_that_is_no_ledger_stops_everything(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(PrivacyError, match="restore it from a backup"):
        Ledger(tmp_path / "ledger.sqlite").charge(use(), LIMIT, DELTA)


def _charge_once(path: Path, start: float, sender: Connection) -> None:
    time.sleep(max(0.0, start - time.time()))
    try:
        Ledger(path).charge(use(), LIMIT, DELTA)
        sender.send(True)
    except PrivacyError:
        sender.send(False)


@pytest.mark.attack
def test_two_runs_at_once_cannot_both_spend_the_last_of_a_budget(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for turn in range(5):
        path = tmp_path / f"{turn}.sqlite"
        Ledger(path).charge(use(), LIMIT, DELTA)
        pipes = [context.Pipe(duplex=False) for _ in range(3)]
        start = time.time() + 0.1
        runs = [context.Process(target=_charge_once, args=(path, start, sender)) for _, sender in pipes]
        for run in runs:
            run.start()
        for run in runs:
            run.join(60)
        assert sum(receiver.recv() for receiver, _ in pipes) == 1
        assert len(Ledger(path).entries()) == 2


@pytest.fixture
def private_task(site_yaml: Path) -> TrainTask:
    site = load_site(site_yaml)
    index_site(site)
    return small_task(site)


@pytest.mark.slow
def test_a_private_site_sends_noised_tensors_its_name_and_nothing_else(
    site_yaml: Path, private_task: TrainTask
) -> None:
    site = load_site(site_yaml)
    content = messages.pack_result(app.handle_train(site, private_task))
    sent = {
        f"{record}/{key}" for record, values in content.items() for key in values if record not in ("state", "drift")
    }
    assert sent == {"site/name", "site/round"}  # a new field must be withheld, paid for, or said to be public here
    assert set(content) == {"state", "drift", "numbers", "site"}
    assert set(messages.unpack_tensors(content.array_records["state"])) == set(private_task.state)
    assert list(messages.unpack_tensors(content.array_records["drift"])) == ["drift"]
    charged = Ledger(site.ledger_path).entries()
    assert {entry.purpose for entry in charged} == {"training", "drift"}


@pytest.mark.slow
def test_a_deployed_private_site_adds_a_signature_and_its_logs_head(
    site_yaml: Path, private_task: TrainTask, tmp_path: Path
) -> None:
    home = approved(make_home(tmp_path, site_yaml, from_mapping(StudyConfig, json.loads(private_task.study))))
    recorder = AuditRecorder(home, "train", 1)
    recorder.record_task(private_task)
    result = app.handle_train(home.site(), private_task, None, recorder.record_training)
    content = messages.pack_result(recorder.sign_result(private_task, result))
    sent = {
        f"{record}/{key}" for record, values in content.items() for key in values if record not in ("state", "drift")
    }
    head = {f"attestation/head-{name}" for name in ("site", "study", "sequence", "hash", "time", "signature")}
    # the head's hash is salted, so it says nothing of the counts in the log; its number counts what the server asked
    # and what the data manager did (approvals, dry runs), its time is the answer's; signatures are over what is sent
    assert sent == {"site/name", "site/round", "attestation/signature", *head}
    first, second = (recorder.sign_result(private_task, result).attestation for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.head.hash != second.head.hash


@pytest.mark.slow
@pytest.mark.attack
def test_no_more_rounds_of_a_study_are_trained_than_the_site_allows(site_yaml: Path, private_task: TrainTask) -> None:
    site = load_site(site_yaml, ["policy.max_rounds=2", "policy.repeated_rounds=9", "policy.max_epsilon=1e6"])
    for _ in range(2):
        app.handle_train(site, private_task)
    with pytest.raises(PolicyError, match="has trained 2 rounds here, this site allows 2"):
        app.handle_train(site, private_task)
    assert len([entry for entry in Ledger(site.ledger_path).entries() if entry.purpose == "training"]) == 2
    other = json.dumps({**json.loads(private_task.study), "name": "another"})
    app.handle_train(site, replace(private_task, study=other))


@pytest.mark.slow
@pytest.mark.attack
def test_a_study_whose_rounds_are_asked_again_costs_no_more_than_it_states(
    site_yaml: Path, private_task: TrainTask
) -> None:
    site = load_site(site_yaml, ["policy.max_epsilon=1e6"])
    study = from_mapping(StudyConfig, json.loads(private_task.study))
    for _ in range(study.federation.rounds):
        app.handle_train(site, private_task)
    with pytest.raises(PolicyError, match=r"this site allows 2 .*policy\.repeated_rounds"):
        app.handle_train(site, private_task)
    spent = epsilon(private_charges(Ledger(site.ledger_path).entries()), study.privacy.target_delta)
    assert spent <= study.privacy.target_epsilon
    app.handle_train(load_site(site_yaml, ["policy.max_epsilon=1e6", "policy.repeated_rounds=1"]), private_task)


def test_a_study_that_cannot_end_within_the_limit_is_refused_before_its_first_round(
    site_yaml: Path, private_task: TrainTask
) -> None:
    planned = from_mapping(StudyConfig, json.loads(private_task.study)).privacy_plan()
    step = replace(planned.step, steps=2)
    assert planned.drift is not None
    one, whole = (epsilon([charge, planned.drift], DELTA) for charge in (step, planned.step))
    assert one < whole
    site = load_site(site_yaml, [f"policy.max_epsilon={(one + whole) / 2}"])
    with pytest.raises(PrivacyError, match="all rounds together, would bring this data set's ε from 0 to"):
        app.handle_train(site, private_task)
    assert Ledger(site.ledger_path).entries() == []


@pytest.mark.attack
def test_looking_at_a_private_studys_drift_releases_none(site_yaml: Path, private_task: TrainTask) -> None:
    site = load_site(site_yaml)
    study = from_mapping(StudyConfig, json.loads(private_task.study))
    assert report_drift(site, study, "moments", None, lambda *_: None).drift
    assert Ledger(site.ledger_path).entries() == []
    app.handle_train(site, private_task)
    assert {entry.purpose for entry in Ledger(site.ledger_path).entries()} == {"training", "drift"}


@pytest.mark.attack
def test_a_ledger_in_a_folder_that_is_not_there_is_not_begun_anew(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="mount it"):
        Ledger(tmp_path / "unmounted/ledger.sqlite").charge(use(), LIMIT, DELTA)


def test_a_drift_that_cannot_be_made_is_not_charged(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise PrivacyError("no drift")

    ledger = Ledger(tmp_path / "ledger.sqlite")
    with pytest.raises(PrivacyError, match="no drift"):
        ledger.charge(replace(use(), drift=NoisedRelease("key", STEP, fail)), LIMIT, DELTA)
    assert (ledger.entries(), ledger.noised_release("key")) == ([], None)
    ledger.charge(replace(use(), drift=NoisedRelease("key", STEP, lambda: b"noised")), LIMIT, DELTA)
    assert [entry.purpose for entry in ledger.entries()] == ["training", "drift"]
    assert ledger.noised_release("key") == b"noised"


def test_a_noised_drift_is_paid_for_once_and_then_the_same(site_yaml: Path, private_task: TrainTask) -> None:
    site = load_site(site_yaml)
    first, second = app.handle_train(site, private_task), app.handle_train(site, replace(private_task, round=2))
    assert first.drift is not None
    assert second.drift is not None
    assert torch.equal(first.drift, second.drift)
    purposes = [entry.purpose for entry in Ledger(site.ledger_path).entries()]
    assert sorted(purposes) == ["drift", "training", "training"]
    store = open_store(site.store_path)
    plain = store.latents.mean((0, 2, 3)) - store.base_latent_mean
    assert not torch.allclose(first.drift[:, 0, 0], plain, atol=1e-3)
    assert float(first.drift.norm()) <= 4.0 + 1e-5  # so few patients leave nothing but noise, within the clip norm


@pytest.mark.attack
def test_a_site_refuses_what_its_policy_or_budget_forbids(site_yaml: Path, private_task: TrainTask) -> None:
    with pytest.raises(PrivacyError, match="above this site's limit 1"):
        app.handle_train(load_site(site_yaml, ["policy.max_epsilon=1"]), private_task)
    with pytest.raises(PrivacyError, match=r"policy.delta is 0.5: with 3 patients"):
        app.handle_train(load_site(site_yaml, ["policy.delta=0.5"]), private_task)
    open_study = {**json.loads(private_task.study), "privacy": {"enabled": False}}
    with pytest.raises(PolicyError, match="differential privacy only"):
        app.handle_train(
            load_site(site_yaml, ["policy.private_only=true"]), replace(private_task, study=json.dumps(open_study))
        )
    assert Ledger(load_site(site_yaml).ledger_path).entries() == []


@pytest.mark.slow
def test_whenever_a_site_is_killed_the_ledger_holds_at_least_what_was_sent(
    site_yaml: Path, private_task: TrainTask
) -> None:
    found = kill_rounds(load_site(site_yaml), kills=12, seed=0)
    assert found.under_counts == 0
    assert found.lost > 1  # else no kill fell between a charge and its sending


@pytest.mark.slow
def test_the_budget_shows_what_is_spent_and_what_a_study_would_cost(site_yaml: Path, private_task: TrainTask) -> None:
    site = load_site(site_yaml, ["policy.max_epsilon=8"])
    before = read_budget(site, None)
    assert (before.charges, before.spent, before.max_epsilon) == (0, 0.0, 8.0)
    app.handle_train(site, private_task)
    study = from_mapping(StudyConfig, {**json.loads(private_task.study), "name": "second"})
    report = read_budget(site, study)
    assert [(entry.rounds, entry.drifts) for entry in report.studies] == [(1, 1)]
    assert report.spent == epsilon(private_charges(Ledger(site.ledger_path).entries()), site.policy.delta)
    assert report.cost is not None
    assert report.cost.refused
    assert report.cost.epsilon_after_study is not None
    assert report.cost.epsilon_after_study > 8
    assert report.cost.drift_noise == pytest.approx(10 * 2**0.5 * 4 / study.privacy.patients)
    text = "\n".join(report.lines())
    assert f"{report.spent:.4g} of 8" in text
    assert "does not fit" in text
    assert "drift.shape" in text  # the drift's noise is far above the latents' scale
    open_study = from_mapping(StudyConfig, {**json.loads(private_task.study), "privacy": {"enabled": False}})
    cost = read_budget(site, open_study).cost
    assert cost is not None
    assert (cost.differential_privacy, cost.epsilon) == (False, None)


@pytest.mark.slow
def test_with_many_patients_a_noised_drift_is_near_the_plain_one(site_yaml: Path, private_task: TrainTask) -> None:
    site = load_site(site_yaml)
    store = open_store(site.store_path)
    study = from_mapping(StudyConfig, json.loads(private_task.study))
    study.drift.shape = "channel"
    study.privacy.drift_clip_norm = 20.0
    rows = torch.arange(6).repeat(2000)
    many = replace(
        store, latents=store.latents[rows], prompts=[store.prompts[row] for row in rows],
        pseudonyms=[f"{number}" for number in range(len(rows))],
    )  # fmt: skip
    found = noised_drift(many, study)
    plain = store.latents.mean((0, 2, 3)) - store.base_latent_mean
    # deviation 10 * sqrt(2) * 20 / 12,000 = 0.024 for each channel
    assert float((found[:, 0, 0] - plain).abs().max()) < 0.15
