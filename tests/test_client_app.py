"""A site's handlers: what they refuse, and that nothing but a code leaves when they fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from ld_client import app
from ld_client.site import load_site
from ld_client.store import build_store, open_store
from ld_client.train import DivergedError, Lesson, train_round
from ld_common import messages
from ld_common.config import from_mapping, to_mapping
from ld_common.errors import AdapterError, ConfigError, LdError, PolicyError
from ld_common.messages import TrainTask
from ld_common.models import base_digest, load_denoiser
from ld_common.schemes import Attached, attach, read_scheme
from ld_common.study import StudyConfig


@pytest.fixture
def task(site_yaml: Path, tiny_base: Path) -> TrainTask:
    site = load_site(site_yaml)
    build_store(site)
    study = from_mapping(StudyConfig, {"scheme": {"rank": 2}, "training": {"steps": 3, "batch_size": 2}})
    store = open_store(site.store_path)
    return TrainTask(
        attached(tiny_base, study).learned_state(),
        1,
        json.dumps(to_mapping(study)),
        base_digest(str(tiny_base)),
        store.modality_digest,
    )


def attached(tiny_base: Path, study: StudyConfig) -> Attached:
    return attach(load_denoiser(str(tiny_base)), read_scheme(study.scheme), study.seed)


def test_a_round_trains_and_returns_what_may_leave(site_yaml: Path, task: TrainTask) -> None:
    site = load_site(site_yaml)
    first, again = app.run_task(site, task), app.run_task(site, task)
    assert (first.site, first.round) == ("aster", 1)
    assert first.numbers is not None
    assert (first.numbers.visits, first.numbers.patients) == (6, 3)
    assert any(not torch.equal(first.state[name], task.state[name]) for name in task.state)
    assert all(torch.equal(first.state[name], again.state[name]) for name in task.state)
    other = app.run_task(site, replace(task, round=2))
    assert any(not torch.equal(first.state[name], other.state[name]) for name in task.state)
    assert first.drift is not None
    store = open_store(site.store_path)
    expected = store.latents.mean((0, 2, 3)) - store.base_latent_mean
    assert torch.allclose(first.drift[:, 0, 0], expected, atol=1e-5)


def test_results_and_tasks_survive_the_wire(site_yaml: Path, task: TrainTask) -> None:
    back = messages.unpack_task(messages.pack_task(task))
    assert (back.round, back.study, back.base_digest) == (task.round, task.study, task.base_digest)
    result = app.run_task(load_site(site_yaml), back)
    arrived = messages.unpack_result(messages.pack_result(result))
    assert arrived.drift is not None
    assert result.drift is not None
    assert torch.equal(arrived.drift, result.drift)
    assert all(torch.equal(arrived.state[name], result.state[name]) for name in result.state)
    assert arrived.uplink_bytes == 4 * (sum(value.numel() for value in result.state.values()) + result.drift.numel())


def test_only_the_adapter_changes_in_training(site_yaml: Path, task: TrainTask, tiny_base: Path) -> None:
    study = from_mapping(StudyConfig, json.loads(task.study))
    before = load_denoiser(str(tiny_base)).unet.state_dict()
    adapted, store = attached(tiny_base, study), open_store(load_site(site_yaml).store_path)
    losses = train_round(adapted, Lesson(store.latents, store.prompts), study, 1, "aster")
    assert len(losses.values) == 3
    after = {name.replace(".base_layer.", "."): value for name, value in adapted.model.unet.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_half_precision_computes_so_and_learns_in_float32(site_yaml: Path, task: TrainTask) -> None:
    site = load_site(site_yaml, ["precision=bfloat16"])
    half, full = app.run_task(site, task), app.run_task(load_site(site_yaml), task)
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
        app.run_task(load_site(site_yaml), replace(task, **changed))  # type: ignore[arg-type]
    assert caught.value.code == code


def test_a_loss_that_is_not_finite_ends_the_round(site_yaml: Path, task: TrainTask, tiny_base: Path) -> None:
    study = from_mapping(StudyConfig, json.loads(task.study))
    adapted, store = attached(tiny_base, study), open_store(load_site(site_yaml).store_path)
    with pytest.raises(DivergedError):
        train_round(adapted, Lesson(store.latents * float("nan"), store.prompts), study, 1, "aster")
    with pytest.raises(AdapterError):
        adapted.load({"unet.none": torch.zeros(1)})


@pytest.mark.parametrize("error", [ValueError, RuntimeError, LdError, KeyError, OSError])
def test_no_exceptions_text_leaves_the_site(
    site_yaml: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error("PLANTED-ANNA, /secret/path")

    monkeypatch.setattr(app, "run_task", fail)
    monkeypatch.setattr(app.messages, "unpack_task", lambda content: None)
    context = Context(
        run_id=1, node_id=1, node_config={"site-config": str(site_yaml)}, state=RecordDict(), run_config={}
    )
    incoming = Message(RecordDict(), dst_node_id=1, message_type="train")
    incoming.metadata.__dict__["_message_id"] = "x"
    reply = app.app(incoming, context)
    assert not reply.has_error()
    assert "PLANTED" not in str(reply.content)
    assert "secret" not in str(reply.content)
    assert messages.unpack_error(reply.content) == messages.ERROR_SENTENCES["error"]


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
        ({"drift": ["none"]}, "drift.mean=channel"),
        ({"min_patients": 4}, "min_patients 4"),
    ],
)
def test_a_study_that_asks_for_more_than_the_site_allows_is_refused(
    site_yaml: Path, task: TrainTask, policy: dict[str, object], words: str
) -> None:
    site = load_site(site_yaml)
    limited = replace(site, policy=replace(site.policy, **policy))  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match=words):
        app.run_task(limited, task)


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": {"name": "dreambooth", "prior_samples": 10**7}},
        {"drift": {"choice": "grid", "mean": "scalar", "search": {"images": 10**6}}},
    ],
)
def test_work_before_training_is_bounded_before_it_is_done(
    site_yaml: Path, task: TrainTask, options: dict[str, object]
) -> None:
    study = from_mapping(StudyConfig, {"training": {"steps": 1, "batch_size": 1}, **options})
    with pytest.raises(PolicyError, match="network evaluations"):
        app.run_task(load_site(site_yaml), replace(task, study=json.dumps(to_mapping(study))))


@pytest.mark.parametrize("name", ["../x", "a/b", "St. Mary", "release", "0", "nan", "", "$x"])
def test_a_name_that_files_or_commands_would_stumble_over_names_no_site(site_yaml: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a site"):
        from_mapping(StudyConfig, {"federation": {"sites": [name, "b"]}})
    with pytest.raises(ConfigError, match="cannot name a site"):
        load_site(site_yaml, [f"site='{name}'"])


def test_the_server_cannot_name_the_sites_config() -> None:
    context = Context(
        run_id=1, node_id=1, node_config={"partition-id": 0}, state=RecordDict(), run_config={"sites": "/anywhere"}
    )
    with pytest.raises(ConfigError, match="no site"):
        app.own_site(context)
