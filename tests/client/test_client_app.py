"""A site's handlers: what they refuse, and that nothing but a code leaves when they fail."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, time, timedelta
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict

from ld_client import client_app as app
from ld_client.data.store import open_store
from ld_client.deployment.approve import approve, withdraw
from ld_client.deployment.audit_log import parse_line
from ld_client.deployment.audit_verify import verify_home
from ld_client.deployment.site_home import SiteHome
from ld_client.policy import check_hours, within_memory
from ld_client.privacy.ledger import Ledger
from ld_client.site_config import PolicyConfig, load_site
from ld_client.train import train_round
from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.registry import read_adapter
from ld_common.adapters.state_dict import state_digest
from ld_common.core.config import from_mapping, to_mapping
from ld_common.core.errors import AdapterError, ConfigError, LdError, PolicyError
from ld_common.diffusion.base_model import base_digest, load_denoiser
from ld_common.diffusion.training import DivergedError, TrainingData
from ld_common.protocol import messages
from ld_common.protocol.messages import TrainTask
from ld_common.protocol.study_config import StudyConfig
from tests.support.site_homes import asked, index_site, make_home, node_of


@pytest.fixture
def task(site_yaml: Path, tiny_base: Path) -> TrainTask:
    site = load_site(site_yaml)
    index_site(site)
    study = from_mapping(
        StudyConfig, {"adapter": {"rank": 2, "targets": ["to_k", "to_v"]}, "training": {"steps": 3, "batch_size": 2}}
    )
    store = open_store(site.store_path)
    return TrainTask(
        adapted_model(tiny_base, study).trainable_state(),
        1,
        json.dumps(to_mapping(study)),
        base_digest(str(tiny_base)),
        store.modality_digest,
    )


def adapted_model(tiny_base: Path, study: StudyConfig) -> AdaptedModel:
    return inject(load_denoiser(str(tiny_base)), read_adapter(study.adapter), study.seed)


def test_a_round_trains_and_returns_what_may_leave(site_yaml: Path, task: TrainTask) -> None:
    site = load_site(site_yaml)
    first, again = app.handle_train(site, task), app.handle_train(site, task)
    assert (first.site, first.round) == ("aster", 1)
    assert first.numbers is not None
    assert (first.numbers.visits, first.numbers.patients) == (6, 3)
    assert any(not torch.equal(first.state[name], task.state[name]) for name in task.state)
    assert all(torch.equal(first.state[name], again.state[name]) for name in task.state)
    other = app.handle_train(site, replace(task, round=2))
    assert any(not torch.equal(first.state[name], other.state[name]) for name in task.state)
    assert first.drift is not None
    store = open_store(site.store_path)
    expected = store.latents.mean((0, 2, 3)) - store.base_latent_mean
    assert torch.allclose(first.drift[:, 0, 0], expected, atol=1e-5)


@pytest.mark.slow
def test_a_site_trains_with_the_frozen_part_that_a_task_brings(
    site_yaml: Path, task: TrainTask, tiny_base: Path
) -> None:
    study = from_mapping(StudyConfig, json.loads(task.study))
    study.adapter["freeze_a"] = True
    own, site = adapted_model(tiny_base, study), load_site(site_yaml)
    drawn = replace(task, state=own.trainable_state())
    frozen = {name: -value for name, value in own.frozen_state().items()}
    study.start_digest = state_digest({**frozen, **own.trainable_state()})
    started = replace(drawn, study=json.dumps(to_mapping(study)))
    brought = messages.unpack_task(messages.pack_task(replace(started, frozen=frozen)))
    app.handle_train(site, brought)
    # in a later round whose start no site has seen, with the same draws: B learns the opposite under the opposite A
    unseen = replace(site, policy=replace(site.policy, accept_unseen_start=True))
    sites = [replace(unseen, ledger=str(site_yaml.with_name(f"{name}.sqlite"))) for name in ("plain", "flipped")]
    study.start_digest = "0" * 64
    later = replace(brought, round=2, study=json.dumps(to_mapping(study)))
    tasks = replace(later, frozen=own.frozen_state()), later
    plain, flipped = (app.handle_train(*asked) for asked in zip(sites, tasks, strict=True))
    assert set(flipped.state) == set(own.trainable)
    for name in flipped.state:
        assert torch.allclose(flipped.state[name], -plain.state[name], atol=1e-6)
        assert bool(plain.state[name].abs().sum() > 0)
    with pytest.raises(PolicyError, match="start_digest"):
        app.handle_train(site, started)
    for wrong in (task.state, dict(list(brought.frozen.items())[1:])):
        with pytest.raises(AdapterError):
            app.handle_train(site, replace(brought, frozen=wrong))


def test_results_and_tasks_survive_the_wire(site_yaml: Path, task: TrainTask) -> None:
    back = messages.unpack_task(messages.pack_task(task))
    assert (back.round, back.study, back.base_digest) == (task.round, task.study, task.base_digest)
    result = app.handle_train(load_site(site_yaml), back)
    arrived = messages.unpack_result(messages.pack_result(result))
    assert arrived.drift is not None
    assert result.drift is not None
    assert torch.equal(arrived.drift, result.drift)
    assert all(torch.equal(arrived.state[name], result.state[name]) for name in result.state)
    assert arrived.uplink_bytes == 4 * (sum(value.numel() for value in result.state.values()) + result.drift.numel())


def test_only_the_adapter_changes_in_training(site_yaml: Path, task: TrainTask, tiny_base: Path) -> None:
    study = from_mapping(StudyConfig, json.loads(task.study))
    before = load_denoiser(str(tiny_base)).unet.state_dict()
    adapted, store = adapted_model(tiny_base, study), open_store(load_site(site_yaml).store_path)
    losses = train_round(adapted, TrainingData(store.latents, store.prompts), study, 1, "aster")
    assert len(losses.values) == 3
    after = {name.replace(".base_layer.", "."): value for name, value in adapted.model.unet.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_half_precision_computes_so_and_learns_in_float32(site_yaml: Path, task: TrainTask) -> None:
    site = load_site(site_yaml, ["precision=bfloat16"])
    half, full = app.handle_train(site, task), app.handle_train(load_site(site_yaml), task)
    assert all(value.dtype == torch.float32 for value in half.state.values())
    assert any(not torch.equal(half.state[name], task.state[name]) for name in task.state)
    assert any(not torch.equal(half.state[name], full.state[name]) for name in task.state)
    assert half.numbers is not None
    assert full.numbers is not None
    assert half.numbers.loss_last == pytest.approx(full.numbers.loss_last, rel=0.05)


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"base_digest": "0" * 64}, "model"),
        ({"modality_digest": "0" * 64}, "store"),
        ({"state": {"unet.a": torch.zeros(1)}}, "adapter"),
        ({"study": '{"surprise": 1}'}, "config"),
        ({"round": 6}, "policy"),
        ({"round": 0}, "policy"),
    ],
)
def test_a_study_that_does_not_fit_the_site_is_refused(
    site_yaml: Path, task: TrainTask, changed: dict[str, object], code: str
) -> None:
    with pytest.raises(LdError) as caught:
        app.handle_train(load_site(site_yaml), replace(task, **changed))  # type: ignore[arg-type]
    assert caught.value.code == code


def test_a_loss_that_is_not_finite_ends_the_round(site_yaml: Path, task: TrainTask, tiny_base: Path) -> None:
    study = from_mapping(StudyConfig, json.loads(task.study))
    adapted, store = adapted_model(tiny_base, study), open_store(load_site(site_yaml).store_path)
    with pytest.raises(DivergedError):
        train_round(adapted, TrainingData(store.latents * float("nan"), store.prompts), study, 1, "aster")
    with pytest.raises(AdapterError):
        adapted.load({"unet.none": torch.zeros(1)})


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"max_steps": 2}, "training.steps=3"),
        ({"max_batch_size": 1}, "visits in a step=2"),
        ({"max_parameters": 100}, "this site allows 100"),
        ({"drift": ["none"]}, "drift.shape=channel"),
        ({"min_patients": 4}, "min_patients 4"),
        ({"max_rounds": 4}, "federation.rounds=5"),
        ({"max_memory_gb": 0.01}, "max_memory_gb"),
    ],
)
@pytest.mark.attack
def test_a_study_that_asks_for_more_than_the_site_allows_is_refused(
    site_yaml: Path, task: TrainTask, policy: dict[str, object], words: str
) -> None:
    site = load_site(site_yaml)
    limited = replace(site, policy=replace(site.policy, **policy))  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match=words):
        app.handle_train(limited, task)


@pytest.mark.parametrize(
    "options",
    [
        {"adapter": {"name": "dreambooth", "num_class_images": 10**7}},
        {"drift": {"estimator": "grid", "shape": "scalar", "search": {"images": 10**6}}},
    ],
)
@pytest.mark.attack
def test_work_before_training_is_bounded_before_it_is_done(
    site_yaml: Path, task: TrainTask, options: dict[str, object]
) -> None:
    study = from_mapping(StudyConfig, {"training": {"steps": 1, "batch_size": 1}, **options})
    with pytest.raises(PolicyError, match="network evaluations"):
        app.handle_train(load_site(site_yaml), replace(task, study=json.dumps(to_mapping(study))))


@pytest.mark.parametrize("name", ["../x", "a/b", "St. Mary", "release", "0", "nan", "", "$x"])
@pytest.mark.attack
def test_a_name_that_files_or_commands_would_stumble_over_names_no_site(site_yaml: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a site"):
        from_mapping(StudyConfig, {"federation": {"sites": [name, "b"]}})
    with pytest.raises(ConfigError, match="cannot name a site"):
        load_site(site_yaml, [f"site='{name}'"])


@pytest.mark.attack
def test_the_server_cannot_name_the_sites_config() -> None:
    context = Context(
        run_id=1, node_id=1, node_config={"partition-id": 0}, state=RecordDict(), run_config={"sites": "/anywhere"}
    )
    with pytest.raises(ConfigError, match="no site"):
        app.site_file_of_node(context)


def test_a_node_with_a_home_is_the_site_that_lies_there(tmp_path: Path) -> None:
    context = Context(run_id=1, node_id=1, node_config={"home": str(tmp_path)}, state=RecordDict(), run_config={})
    assert app.home_of_node(context) == SiteHome(tmp_path)
    assert app.site_file_of_node(context) == tmp_path / "site.yaml"


@pytest.fixture
def home(site_yaml: Path, task: TrainTask, tmp_path: Path) -> SiteHome:
    return make_home(tmp_path, site_yaml, from_mapping(StudyConfig, json.loads(task.study)))


def events(home: SiteHome) -> list[str]:
    return [parse_line(line).event for line in home.audit_log.read_bytes().splitlines()]


def answered(home: SiteHome, task: TrainTask) -> RecordDict:
    return app.app(asked(messages.pack_task(task), "train"), node_of(home)).content


@pytest.mark.slow
@pytest.mark.attack
def test_nothing_is_trained_that_was_not_approved(home: SiteHome, task: TrainTask) -> None:
    refused = answered(home, task)
    assert messages.unpack_error(refused) == messages.ERROR_SENTENCES["approval"]
    assert Ledger(home.site().ledger_path).entries() == []
    approve(home)
    assert messages.unpack_result(answered(home, task)).attestation is not None
    study = json.loads(task.study)
    study["training"]["steps"] += 1
    for other in (replace(task, study=json.dumps(study)), replace(task, base_digest="0" * 64)):
        assert messages.unpack_error(answered(home, other)) == messages.ERROR_SENTENCES["approval"]
    withdraw(home)
    assert messages.unpack_error(answered(home, task)) == messages.ERROR_SENTENCES["approval"]
    assert len(Ledger(home.site().ledger_path).entries()) == 1
    told, ran = ["asked", "task"], ["training", "left", "head"]
    assert events(home) == [
        "opened",
        *told,
        "refused",
        "approved",
        *told,
        *ran,
        *told,
        "refused",
        *told,
        "refused",
        "withdrawn",
        *told,
        "refused",
    ]
    entries = [parse_line(line) for line in home.audit_log.read_bytes().splitlines()]
    (first, *_) = [entry.details for entry in entries if entry.event == "refused"]
    assert (first["code"], first["error"], first["round"]) == ("approval", "ApprovalError", 1)
    assert "not approved" in first["reason"]


@pytest.mark.attack
def test_a_study_that_cannot_be_read_is_written_down_and_refused(home: SiteHome, task: TrainTask) -> None:
    approve(home)
    for study in ("not JSON", '{"surprise": 1}', '{"name": "\\ud800"}'):
        assert messages.unpack_error(answered(home, replace(task, study=study))) is not None
    assert messages.unpack_error(answered(home, replace(task, nonce="Anna"))) == messages.ERROR_SENTENCES["federation"]
    reply = app.app(asked(RecordDict(), "train"), node_of(home))
    assert messages.unpack_error(reply.content) == messages.ERROR_SENTENCES["error"]
    assert events(home).count("refused") == 5
    assert verify_home(home).problems == []
    assert Ledger(home.site().ledger_path).entries() == []


def test_without_a_log_nothing_is_answered(home: SiteHome, task: TrainTask) -> None:
    approve(home)
    home.audit_log.unlink()
    home.audit_log.mkdir()
    assert messages.unpack_error(answered(home, task)) == messages.ERROR_SENTENCES["deployment"]
    reply = app.app(asked(RecordDict(), f"query.{messages.JOIN}"), node_of(home))
    assert messages.unpack_name(reply.content) is None
    assert Ledger(home.site().ledger_path).entries() == []
    home.audit_log.rmdir()
    home.key_file("signing").chmod(0o644)
    assert messages.unpack_error(answered(home, task)) == messages.ERROR_SENTENCES["signature"]


def test_a_join_is_answered_and_written_down(home: SiteHome) -> None:
    reply = app.app(asked(RecordDict(), f"query.{messages.JOIN}"), node_of(home))
    assert messages.unpack_name(reply.content) == "aster"
    assert events(home) == ["opened", "asked", "left"]


@pytest.mark.parametrize(
    ("hours", "now", "within"),
    [
        ("", "12:00", True),
        ("20:00-06:00", "19:59", False),
        ("20:00-06:00", "20:00", True),
        ("20:00-06:00", "00:00", True),
        ("20:00-06:00", "05:59", True),
        ("20:00-06:00", "06:00", False),
        ("08:00-12:00", "08:00", True),
        ("08:00-12:00", "12:00", False),
        ("08:00-12:00", "23:00", False),
        ("00:00-00:00", "13:00", True),
    ],
)
def test_rounds_begin_within_the_sites_hours_alone(hours: str, now: str, within: bool) -> None:
    policy = PolicyConfig(hours=hours)
    if within:
        check_hours(policy, time.fromisoformat(now))
    else:
        with pytest.raises(PolicyError, match=f"it is {now} here: .*{hours}"):
            check_hours(policy, time.fromisoformat(now))


def test_a_task_outside_the_hours_is_refused(site_yaml: Path, task: TrainTask) -> None:
    now = datetime.now()
    hours = f"{now + timedelta(hours=2):%H:%M}-{now + timedelta(hours=3):%H:%M}"
    with pytest.raises(PolicyError, match=r"policy\.hours"):
        app.handle_train(load_site(site_yaml, [f"policy.hours='{hours}'"]), task)


@pytest.mark.parametrize("hours", ["20-6", "24:00-06:00", "20:00", "20:00-06:60", "20:00-06:00 "])
def test_hours_that_are_none_are_refused(site_yaml: Path, hours: str) -> None:
    with pytest.raises(ConfigError, match=r"policy\.hours"):
        load_site(site_yaml, [f"policy.hours='{hours}'"])


def test_a_process_is_held_to_its_memory_and_let_go_again() -> None:
    def private_gb() -> float:
        (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmData:")]
        return int(line.split()[1]) / 2**20

    policy = PolicyConfig(max_memory_gb=private_gb() + 0.25)
    with within_memory(policy):
        assert torch.ones(2**24).sum() == 2**24  # 64 MiB
    for ask_too_much in (lambda: torch.ones(2**28), lambda: bytearray(2**30)):
        with pytest.raises(PolicyError, match="the round needs more"), within_memory(policy):
            ask_too_much()
    with pytest.raises(RuntimeError, match="another reason"), within_memory(policy):
        raise RuntimeError("another reason")
    assert torch.ones(2**28).numel() == 2**28
