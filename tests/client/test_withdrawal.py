"""A patient who withdraws consent leaves store, caches and rounds; what that means for studies is said, not hidden."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from typer.testing import CliRunner

import ld_client.round as rounds
from ld_client import client_app
from ld_client.cli import app
from ld_client.data.exclusions import Reason, read_exclusions
from ld_client.data.held_out import held_out_patients
from ld_client.data.indexing import build_store
from ld_client.data.participation import PARTICIPATION, read_participations, record_participation
from ld_client.data.pseudonyms import pseudonym
from ld_client.data.store import Store, open_store, split_store
from ld_client.data.store_key import KEY_FILE, load_key
from ld_client.data.withdrawals import WITHDRAWALS, former_patients, withdrawn
from ld_client.data.withdrawn_scans import WithdrawnScans
from ld_client.deployment.audit_log import CONSENT, log_entries
from ld_client.deployment.audit_recorder import AuditRecorder
from ld_client.deployment.audit_verify import verify_home
from ld_client.deployment.cohort import renew_cohort
from ld_client.deployment.site_home import SiteHome
from ld_client.pacs.command import QUARANTINE
from ld_client.pacs.fetcher import HIDDEN
from ld_client.privacy.ledger import TRAINING, Ledger, Use
from ld_client.privacy_report.warnings import withdrawal_warnings
from ld_client.site_config import RESIDUALS, SiteConfig, load_site
from ld_client.withdrawal import removal
from ld_client.withdrawal.retrain_plan import plan_lines, plan_retraining
from ld_client.withdrawal.withdraw import find_patient, withdraw
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.command import run_cli
from ld_common.core.config import from_mapping, to_mapping
from ld_common.core.errors import ConfigError, PolicyError, StoreError
from ld_common.diffusion.base_model import base_digest, load_denoiser
from ld_common.protocol import messages
from ld_common.protocol.dp_accounting import Charge
from ld_common.protocol.messages import TrainTask
from ld_common.protocol.study_config import StudyConfig
from tests.conftest import PLANTED_ROWS, write_mr_slice, write_table
from tests.support.site_homes import approved, asked, index_site, make_home, node_of, task_of

ANNA, BERT = "PLANTED-ANNA", "PLANTED-BERT"
OPTIONS: dict[str, Any] = {
    "name": "demo",
    "adapter": {"name": "lora", "rank": 1, "targets": ["to_k"]},
    "training": {"steps": 2, "batch_size": 2},
    "federation": {"rounds": 5, "sites": ["aster", "birch", "cedar"], "weighting": "equal"},
}
STUDY = from_mapping(StudyConfig, OPTIONS)


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def site(site_yaml: Path) -> SiteConfig:
    """An indexed site of three patients."""
    index_site(load_site(site_yaml))
    return load_site(site_yaml)


@pytest.fixture
def home(site_yaml: Path, tmp_path: Path) -> SiteHome:
    return approved(make_home(tmp_path, site_yaml, STUDY))


def run(*arguments: object) -> int:
    """The exit code of `ld-client`."""
    with pytest.raises(SystemExit) as caught:
        run_cli(app, list(map(str, arguments)))
    return caught.value.code


def name_of(site: SiteConfig, patient: str) -> str:
    return pseudonym(load_key(site.store_path), patient)


def bytes_of(store: Store, name: str) -> list[bytes]:
    """The bytes of a patient's latents and their mirror images, except of scans that another patient's equals."""
    sides: dict[bool, set[bytes]] = {True: set(), False: set()}
    for tensor in (store.latents, store.mirrored):
        for row, owner in enumerate(store.pseudonyms):
            sides[owner == name].add(tensor[row].numpy().tobytes())
    assert len(sides[True] - sides[False]) >= 4
    return sorted(sides[True] - sides[False])


def readable(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(store: Store, without: str) -> list[object]:
    """All that a store holds of the other patients."""
    kept = [row for row, owner in enumerate(store.pseudonyms) if owner != without]
    columns = [store.pseudonyms, store.days, store.attributes, store.prompts]
    tensors = [store.latents[kept], store.mirrored[kept], store.sizes[:, kept] if store.sizes.shape[1] else store.sizes]
    return [[column[row] for row in kept] for column in columns] + [tensor.numpy().tobytes() for tensor in tensors]


def gone(site: SiteConfig, patient: str = ANNA) -> None:
    """Withdraw without the command line."""
    withdraw(site, find_patient(site, patient), None, ())


def task(site: SiteConfig, number: int = 1, study: StudyConfig = STUDY) -> TrainTask:
    state = inject(load_denoiser(site.base_model), read_adapter(study.adapter), study.seed).trainable_state()
    modality = open_store(site.store_path).modality_digest if withdrawn(site.store_path) == frozenset() else ""
    return TrainTask(state, number, json.dumps(to_mapping(study)), base_digest(site.base_model), modality)


def test_no_byte_of_the_patient_is_left_and_the_others_stay_as_they_were(
    site_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stray in ("planted-anna/broken.dcm", "note.txt"):
        (site_yaml.parent / "scans" / stray).write_text("no scan")
    site = load_site(site_yaml)
    build_store(site)
    folder, name = site.store_path, name_of(site, ANNA)
    before, reasons = open_store(folder), [line.reason for line in read_exclusions(folder)]
    secrets = bytes_of(before, name)
    (old_cache,) = folder.glob("cache-*.safetensors")
    for made in ("drift-0123.safetensors", "index.sqlite.part", "cache-77.safetensors.part"):
        (folder / made).write_bytes(b"".join(secrets))
    (folder / "prior-0123.safetensors").write_bytes(b"drawn by the base")
    for series, patient in (("a", ANNA), ("b", BERT)):
        write_mr_slice(folder / QUARANTINE / series / "1.dcm", np.eye(4, dtype=np.uint16), PatientID=patient)
    for noted in ("a", "b"):
        (folder / QUARANTINE / HIDDEN).mkdir(exist_ok=True)
        (folder / QUARANTINE / HIDDEN / f"{noted}.json").write_text("{}")
    (folder / QUARANTINE / HIDDEN / "c").mkdir()
    (folder / QUARANTINE / HIDDEN / "c/incoming.part").write_text("half a file")
    splits = {share: split_store(before, share) for share in (0.0, 0.34, 0.5, 0.67)}

    assert run("withdraw", ANNA, "--config", site_yaml, "--yes") == 0
    said = capsys.readouterr()
    assert ANNA not in said.out + said.err
    assert name not in said.out + said.err
    assert (
        "removed: 3 visits, 6 ordered pairs of visits, 1 series of the quarantine; name and detail of 2 exclusions"
        in said.out
    )
    files = readable(folder)
    assert [file for file, content in files.items() if any(secret in content for secret in secrets)] == []
    assert [file for file, content in files.items() if name.encode() in content] == [WITHDRAWALS]
    assert [file for file, content in files.items() if b"broken" in content or ANNA.encode() in content] == []
    assert sorted(file for file in files if file.startswith(QUARANTINE)) == [
        f"{QUARANTINE}/{HIDDEN}/b.json",
        f"{QUARANTINE}/{HIDDEN}/c/incoming.part",
        f"{QUARANTINE}/b/1.dcm",
    ]
    assert "series of the quarantine that do not say of whom they are: c" in said.out
    assert old_cache.name not in files
    assert "prior-0123.safetensors" in files
    assert {
        path.stat().st_mode & 0o077 for path in folder.iterdir() if path.is_file() and "prior" not in path.name
    } == {0}

    after = open_store(folder)
    assert len(after.prompts) == 3
    assert rows_of(after, name) == rows_of(before, name)
    assert torch.equal(after.base_latent_mean, before.base_latent_mean)
    for share, (trained, hidden) in splits.items():
        now = split_store(after, share)
        assert set(now[0].pseudonyms) == set(trained.pseudonyms) - {name}, share
        assert set(now[1].pseudonyms) == set(hidden.pseudonyms) - {name}, share
    lines = read_exclusions(folder)
    assert [line.reason for line in lines] == reasons
    assert {line.name for line in lines} == {removal.NAME}


def test_the_tensors_that_lose_rows_are_all_that_a_store_has(site: SiteConfig) -> None:
    from safetensors.numpy import load_file

    (cache,) = site.store_path.glob("cache-*.safetensors")
    tensors = load_file(cache)
    assert tensors.keys() == removal.VISIT_AXIS.keys()
    measured = {name: axis for name, axis in removal.VISIT_AXIS.items() if axis is not None and tensors[name].size}
    assert {tensors[name].shape[axis] for name, axis in measured.items()} == {6}


def test_a_withdrawal_moves_nobody_to_the_other_side() -> None:
    names = [f"p{number}" for number in range(40)]
    for share in (0.1, 0.25, 0.5):
        hidden = held_out_patients(names, share)
        moved = 0
        for who in names:
            rest = [name for name in names if name != who]
            assert held_out_patients(rest, share, former=frozenset({who})) == hidden - {who}
            moved += held_out_patients(rest, share) != hidden - {who}
        assert moved  # so the property is not empty
    assert held_out_patients(names[1:], 0.5, True, frozenset(names[:1])) == held_out_patients(names[1:], 0.5, True)


STOPS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "before the cache": lambda patch: patch.setattr(removal, "_write_cache", stop),
    "between cache and index": lambda patch: patch.setattr(removal, "_write_index", stop),
    "before the old files end": lambda patch: patch.setattr(Path, "unlink", stop),
    "before the flush": lambda patch: patch.setattr(removal, "_flush", stop),
}


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", STOPS)
def test_a_withdrawal_that_stops_is_finished_by_the_next(
    site: SiteConfig, site_yaml: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder = name_of(site, ANNA), site.store_path
    secrets = bytes_of(open_store(folder), name)
    whole = replace(site, store=str(folder.parent / "whole"))
    shutil.copytree(folder, whole.store_path)
    gone(whole)
    with monkeypatch.context() as patch:
        STOPS[place](patch)
        with pytest.raises(KeyboardInterrupt):
            gone(site)
    try:
        assert name not in open_store(folder).pseudonyms
    except StoreError as error:
        assert "--finish" in str(error)
    assert run("withdraw", "--finish", "--config", site_yaml) == 0
    left = readable(folder)
    assert [file for file, content in left.items() if any(secret in content for secret in secrets)] == []
    expected = readable(whole.store_path)
    assert left.keys() == expected.keys()
    assert {name: left[name] for name in left if name != WITHDRAWALS} == {
        name: expected[name] for name in expected if name != WITHDRAWALS
    }


def test_twice_is_fine(site: SiteConfig, site_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("withdraw", ANNA, "--config", site_yaml, "--yes", "--json") == 0
    first = json.loads(capsys.readouterr().out)
    content = readable(site.store_path)
    assert run("withdraw", ANNA, "--config", site_yaml, "--yes", "--json") == 0
    second = json.loads(capsys.readouterr().out)
    assert (first["newly"], first["removal"]["held"]["visits"]) == (True, 3)
    assert (second["newly"], second["removal"]["held"]["visits"]) == (False, 0)
    assert readable(site.store_path) == content
    for patient in (BERT, "PLANTED-CARL"):
        assert run("withdraw", patient, "--config", site_yaml, "--yes") == 0
    assert "3 patients have withdrawn from this store so far" in capsys.readouterr().out
    with pytest.raises(StoreError, match="holds no visit"):
        open_store(site.store_path)


def test_what_rounding_took_from_updates_is_deleted(
    site: SiteConfig, site_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    residual = site.ledger_path.parent / RESIDUALS / "study" / "1.safetensors"
    residual.parent.mkdir(parents=True)
    residual.write_bytes(b"of all patients")
    assert run("withdraw", ANNA, "--config", site_yaml, "--yes", "--json") == 0
    assert RESIDUALS in json.loads(capsys.readouterr().out)["removal"]["deleted"]
    assert not (site.ledger_path.parent / RESIDUALS).exists()


@pytest.mark.parametrize("command", [["withdraw"], ["forget", "--retrain-plan"]])
def test_an_unknown_patient_is_one_line_that_names_nobody(
    site: SiteConfig, site_yaml: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = readable(site.store_path)
    assert run(*command, "PLANTED-DORA", "--config", site_yaml) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: neither the store nor the table has this patient: nothing was changed.")
    assert said.err.count("\n") == 1
    assert "DORA" not in said.err
    assert readable(site.store_path) == before


def test_a_person_is_asked_and_may_say_no(site: SiteConfig, site_yaml: Path) -> None:
    before = readable(site.store_path)
    runner = CliRunner()
    refused = runner.invoke(app, ["withdraw", ANNA, "--config", str(site_yaml)], input="n\n")
    assert isinstance(refused.exception, ConfigError)
    assert "3 visits, 6 pairs of visits and 0 fetched series of this patient" in refused.output
    assert readable(site.store_path) == before
    # without the identifier in the command line
    done = runner.invoke(app, ["withdraw", "-", "--config", str(site_yaml), "--yes"], input=f" {ANNA} \n")
    assert done.exit_code == 0
    assert ANNA not in done.output
    assert withdrawn(site.store_path) == {name_of(site, ANNA)}
    wrong: tuple[tuple[str, ...], ...] = (("withdraw",), ("withdraw", ANNA, "--finish"), ("forget", ANNA))
    assert [run(*arguments, "--config", site_yaml) for arguments in wrong] == [2, 2, 2]


def test_a_patient_of_the_table_may_withdraw_before_the_first_index(site_yaml: Path) -> None:
    site = load_site(site_yaml)
    assert run("withdraw", ANNA, "--config", site_yaml, "--yes") == 0
    assert withdrawn(site.store_path) == {name_of(site, ANNA)}
    assert former_patients(site.store_path) == frozenset()
    (site.store_path / KEY_FILE).unlink()
    with pytest.raises(StoreError, match="is missing"):  # with a new key, the list would mean nobody
        load_key(site.store_path)


def test_an_older_store_or_index_never_trains_on_the_patient(site: SiteConfig) -> None:
    older = site.store_path.parent / "older"
    shutil.copytree(site.store_path, older)
    gone(site)
    shutil.copytree(older, site.store_path, dirs_exist_ok=True)
    with pytest.raises(StoreError, match="withdrew consent"):
        open_store(site.store_path)
    withdraw(site, None, None, ())
    assert name_of(site, ANNA) not in open_store(site.store_path).pseudonyms
    (site.store_path / WITHDRAWALS).write_text("{")
    with pytest.raises(StoreError, match="cannot be read"):
        open_store(site.store_path)


@pytest.mark.skipif("consent withdrawn" not in [reason.value for reason in Reason], reason="ingest does not ask yet")
def test_the_next_index_passes_over_the_patient(site: SiteConfig, site_yaml: Path) -> None:
    gone(site)
    write_mr_slice(site_yaml.parent / "scans/planted-anna/2023/x.dcm", np.eye(4, dtype=np.uint16), PatientID=ANNA)
    (site_yaml.parent / f"scans/{ANNA}").mkdir()
    (site_yaml.parent / f"scans/{ANNA}/broken.dcm").write_text("no scan")
    before = open_store(site.store_path)
    write_table(site_yaml, [*PLANTED_ROWS, f"{ANNA},,71,Female,Normal", f"{ANNA},2024-01-01,71,Female,Normal"])
    summary = build_store(site)
    after = open_store(site.store_path)
    assert rows_of(after, "") == rows_of(before, "")
    assert (summary.patients, summary.visits) == (2, 3)
    lines = read_exclusions(site.store_path)
    assert [line.files for line in lines if line.reason.value == "consent withdrawn"] == [11]
    assert not any("anna" in f"{line.name} {line.detail}".lower() or ".dcm" in line.name for line in lines)


def test_scans_of_a_withdrawn_patient_are_counted_by_table_header_or_folder(site: SiteConfig) -> None:
    gone(site)
    scans = WithdrawnScans.of(site.store_path, load_key(site.store_path))
    taken = [(ANNA, "x.dcm"), ("", f"{ANNA}/x.dcm"), ("", f"a/{ANNA}.nii.gz")]
    others = [(BERT, f"{ANNA}/x.dcm"), ("", "x.dcm"), ("", "planted/y.dcm")]
    assert [scans.take_file(*one) for one in [*taken, *others]] == [True] * 3 + [False] * 3
    assert [scans.take_row(one) for one in (ANNA, BERT, "")] == [True, False, False]
    assert (scans.files, scans.rows) == (3, 1)


@pytest.mark.slow
def test_rounds_record_who_trained_and_refuse_the_data_of_who_left(site: SiteConfig) -> None:
    first = task(site)
    client_app.handle_train(site, first)
    (record,) = read_participations(site.ledger_path)
    assert (record.rounds, record.steps, len(record.pseudonyms)) == ([1], 2, 3)
    folder = site.ledger_path.parent / PARTICIPATION
    assert {path.stat().st_mode & 0o077 for path in [folder, *folder.iterdir()]} == {0}
    report = withdraw(site, find_patient(site, ANNA), None, ())
    ((part,), frozen) = report.studies, report.frozen
    assert (part.study, part.rounds, part.patients, frozen) == ("demo", [1], 1, [STUDY.digest()])
    with pytest.raises(PolicyError, match="the store changed"):
        client_app.handle_train(site, replace(first, round=2))
    renew_cohort(Ledger(site.ledger_path), STUDY.digest(), None)
    result = client_app.handle_train(site, replace(first, round=2))
    assert result.numbers is not None
    assert (result.numbers.patients, result.numbers.visits) == (2, 3)
    report = withdraw(site, find_patient(site, ANNA), None, ())
    assert [part.rounds for part in report.studies] == [[1]]
    assert report.frozen == []  # the study goes on without the patient
    plan = plan_retraining(site, frozenset({name_of(site, ANNA)}), (), None)
    assert (plan.studies[0].first_round, plan.studies[0].rounds, plan.studies[0].steps_of_all_sites) == (1, 2, 12)


def test_a_round_under_way_sends_nothing_of_who_left(site: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    train = rounds.train_round

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        losses = train(*arguments, **options)
        gone(site)
        return losses

    monkeypatch.setattr(rounds, "train_round", meanwhile)
    with pytest.raises(StoreError, match="no result leaves"):
        client_app.handle_train(site, task(site))


@pytest.mark.slow
def test_a_held_out_patient_may_leave_a_study_that_goes_on(site: SiteConfig) -> None:
    site = replace(site, held_out=1 / 3)
    (hidden,) = held_out_patients(open_store(site.store_path).pseudonyms, site.held_out)
    patient = next(row.split(",")[0] for row in PLANTED_ROWS if name_of(site, row.split(",")[0]) == hidden)
    first = task(site)
    client_app.handle_train(site, first)
    report = withdraw(site, find_patient(site, patient), None, ())
    assert (report.studies, report.frozen, report.removal.held.visits > 0) == ([], [], True)
    client_app.handle_train(site, replace(first, round=2))
    assert [record.rounds for record in read_participations(site.ledger_path)] == [[1, 2]]


def trained(home: SiteHome, number: int) -> str | None:
    """Train a round as the home's node does; returns what an error's code says."""
    reply = client_app.app(asked(messages.pack_task(task_of(home, round=number)), "train"), node_of(home))
    return messages.unpack_error(reply.content)


def release(home: SiteHome, name: str, numbers: list[int], **changes: Any) -> None:
    """A release's manifest as `ld-client pull` leaves it; each of its rounds took a site an hour."""
    sites = {site: {"seconds": 3600.0} for site in OPTIONS["federation"]["sites"]}
    manifest = {
        "format": 2,
        "study_digest": STUDY.digest(),
        "rounds": [{"round": number, "counted": True, "sites": sites} for number in numbers],
        "weights": "w",
        "files": {"w": name},
        "start": None,
    }
    folder = home.path / "releases" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.slow
def test_a_home_logs_counts_and_says_which_releases(home: SiteHome, capsys: pytest.CaptureFixture[str]) -> None:
    site = home.site()
    assert [trained(home, number) for number in (1, 2)] == [None, None]
    release(home, "demo-1", [1])
    release(home, "demo-2", [1, 2])
    release(home, "other-1", [1], study_digest="0" * 64)
    release(home, "next-1", [1], study_digest="1" * 64, start={"weights_sha256": "demo-2", "start": None})
    home.config_file.write_text(f"# checked: {ANNA}\n" + home.config_file.read_text())
    assert run("withdraw", ANNA, "--home", home.path, "--yes") == 0
    said = capsys.readouterr()
    assert ANNA not in said.out + said.err
    assert "part of study 'demo'" in said.out
    assert "rounds 1 to 2, without differential privacy" in said.out
    assert "releases at this site: demo-1, demo-2, next-1, which began with one of these\n" in said.out
    assert "ld-client cohort --renew" in said.out
    assert f"'{home.config_file}' holds the patient's identifier" in said.out
    entries = [entry for entry in log_entries(home.audit_log) if entry.event == CONSENT]
    assert [(entry.details["withdrawals"], entry.details["visits"]) for entry in entries] == [(1, 3)]
    log = home.audit_log.read_bytes()
    assert not any(word in log for word in (ANNA.encode(), name_of(site, ANNA).encode(), b"planted"))
    assert verify_home(home).problems == []
    assert run("withdraw", ANNA, "--home", home.path, "--yes") == 0
    assert home.audit_log.read_bytes() == log
    assert len(withdrawal_warnings(site, STUDY.digest())) == 1
    assert withdrawal_warnings(site, "0" * 64) == []

    assert run("forget", "--retrain-plan", "--withdrawn", "--home", home.path) == 0
    said = capsys.readouterr()
    assert "to repeat: rounds 1 to 2, 2 steps each at 3 sites: 12 steps, 4 of them here" in said.out
    assert "at this site by its audit log; 6.0 h in sum over the sites" in said.out
    assert "no checkpoint saves a round" in said.out
    assert "no differential privacy" in said.out
    assert "nothing was started" in said.out
    assert home.audit_log.read_bytes() == log


@pytest.mark.attack
def test_a_list_of_withdrawals_from_an_older_copy_is_refused(home: SiteHome) -> None:
    site = home.site()
    older = site.store_path.parent / "older"
    shutil.copytree(site.store_path, older)
    withdraw(site, find_patient(site, ANNA), home, ())
    shutil.rmtree(site.store_path)
    shutil.copytree(older, site.store_path)
    assert trained(home, 1) == messages.ERROR_SENTENCES["store"]
    withdraw(site, find_patient(site, ANNA), home, ())
    AuditRecorder(home, "train", 1).check_withdrawals(site.store_path)


def test_a_plan_says_what_is_not_known_and_what_privacy_bounds(site: SiteConfig) -> None:
    names = open_store(site.store_path).pseudonyms
    privacy = {"enabled": True, "patients": 10, "expected_batch_size": 2, "target_delta": 1e-5}
    private = from_mapping(StudyConfig, OPTIONS | {"name": "private", "privacy": privacy})
    ledger = Ledger(site.ledger_path)
    for number in (1, 2, 3, 4):
        use = Use("private", private.digest(), number, {TRAINING: Charge(5.0, 0.2, 2)}, cohort="x")
        ledger.charge(use, 10.0, 1e-5)
    record_participation(site.ledger_path, private, 1, names[-1:])
    for number in (3, 4):
        record_participation(site.ledger_path, private, number, names)
    ledger.charge(Use("former", "0" * 64, 1, {TRAINING: None}), 10.0, 1e-5)
    patient = frozenset(names) - {names[-1]}
    plan = plan_retraining(site, patient, (), None)
    (cost,) = plan.studies
    assert (cost.first_round, cost.rounds, cost.part.patients) == (3, 2, 2)
    assert cost.spent_epsilon is not None
    assert 0 < cost.spent_epsilon < 10
    said = "\n".join(plan_lines(plan))
    assert "2 of 2 patients took part in rounds 3 to 4 of 5" in said
    assert "not known here" in said
    assert "the weights after round 2, if the server still has them" in said
    assert "up to a factor e^ε" in said
    assert "not recorded: the patients of round 2 of study 'private'" in said
    assert "not recorded: the patients of round 1 of study 'former'" in said
