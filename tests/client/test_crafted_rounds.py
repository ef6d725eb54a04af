"""What a malicious server asks of one round, to see a patient in its update without differential privacy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ld_client.data.store import open_store
from ld_client.data.store_key import KEY_FILE
from ld_client.policy import check_study
from ld_client.privacy.ledger import Ledger
from ld_client.round import handle_train
from ld_client.site_config import PolicyConfig, SiteConfig, load_site
from ld_client.train import train_round
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.adapters.state_dict import state_digest
from ld_common.core.config import from_mapping, to_mapping
from ld_common.core.errors import ConfigError, PolicyError, PrivacyError
from ld_common.core.state import State
from ld_common.diffusion.base_model import base_digest, load_denoiser
from ld_common.diffusion.training import TrainingData
from ld_common.protocol.messages import TrainTask
from ld_common.protocol.study_config import StudyConfig
from tests.support.site_homes import index_site

OPTIONS: dict[str, Any] = {
    "adapter": {"name": "lora", "rank": 1, "targets": ["to_k"]},
    "training": {"steps": 3, "batch_size": 2},
    "drift": {"shape": "none"},
    "federation": {"rounds": 3, "max_update_norm": 2.0},
}


@pytest.fixture
def site(site_yaml: Path) -> SiteConfig:
    found = load_site(site_yaml)
    index_site(found)
    return found


def task_of(site: SiteConfig, round_number: int = 1, **options: Any) -> TrainTask:
    study = from_mapping(StudyConfig, OPTIONS, options)
    state = inject(load_denoiser(site.base_model), read_adapter(study.adapter), study.seed).trainable_state()
    store, said = open_store(site.store_path), json.dumps(to_mapping(study))
    return TrainTask(state, round_number, said, base_digest(site.base_model), store.modality_digest)


def moved(state: State, norm: float) -> State:
    """The state moved by a random direction of an L2 norm."""
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(value.shape, generator=generator) for name, value in state.items()}
    length = float(torch.cat([value.flatten() for value in direction.values()]).norm())
    return {name: value + direction[name] * (norm / length) for name, value in state.items()}


@pytest.mark.attack
def test_the_study_does_not_give_the_draws_away(site: SiteConfig) -> None:
    """With the draws, an exact copy of the update confirms which scans are in it."""
    task = task_of(site)
    sent = handle_train(site, task).state
    study, store = from_mapping(StudyConfig, OPTIONS), open_store(site.store_path)
    data = TrainingData(store.latents, store.prompts, patients=store.pseudonyms)
    adapted = inject(load_denoiser(site.base_model), read_adapter(study.adapter), study.seed)
    train_round(adapted, data, study, 1, site.site)
    guessed = adapted.trainable_state()
    assert max(float((guessed[name] - value).abs().max()) for name, value in sent.items()) > 1e-4
    key = site.store_path / KEY_FILE
    key.write_bytes(b"another key of the same length..")
    other = handle_train(site, task).state
    assert any(not torch.equal(other[name], value) for name, value in sent.items())


def test_a_repeated_round_gives_the_same_bytes(site: SiteConfig) -> None:
    task = task_of(site)
    first, again = handle_train(site, task), handle_train(site, replace(task, nonce="ab"))
    assert all(torch.equal(first.state[name], value) for name, value in again.state.items())


@pytest.mark.attack
def test_a_round_is_not_repeated_from_other_weights(site: SiteConfig) -> None:
    task = task_of(site, 2)
    handle_train(site, replace(task, state=moved(task.state, 1.0)))
    with pytest.raises(PolicyError, match="from other weights"):
        handle_train(site, replace(task, state=moved(task.state, 1.1)))
    handle_train(site, replace(task, state=moved(task.state, 1.0)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("round_number", "norm", "fits"),
    [(1, 0.0, True), (1, 0.1, False), (2, 1.9, True), (2, 2.1, False), (3, 3.9, True), (3, 4.1, False)],
)
@pytest.mark.attack
def test_weights_that_no_rounds_lead_to_are_refused(
    site: SiteConfig, round_number: int, norm: float, fits: bool
) -> None:
    task = task_of(site, round_number)
    crafted = replace(task, state=moved(task.state, norm))
    if fits:
        handle_train(site, crafted)
        return
    with pytest.raises(PolicyError, match="away from the study's first ones"):
        handle_train(site, crafted)


@pytest.mark.slow
@pytest.mark.attack
def test_later_rounds_of_a_study_with_a_start_are_near_the_first_weights(site: SiteConfig) -> None:
    started = moved(task_of(site).state, 5.0)
    task = replace(task_of(site, 2, start="r", start_digest=state_digest(started)), state=moved(started, 1.0))
    with pytest.raises(PolicyError, match="missed round 1"):
        handle_train(site, task)
    unseen = replace(site, policy=replace(site.policy, accept_unseen_start=True))
    handle_train(unseen, task)
    handle_train(site, replace(task, round=1, state=started))
    with pytest.raises(PolicyError, match="away from the study's first ones"):
        handle_train(site, replace(task, round=3, state=moved(started, 4.1)))
    handle_train(site, replace(task, round=3, state=moved(started, 3.9)))


@pytest.mark.attack
def test_crafted_frozen_weights_are_refused(site: SiteConfig) -> None:
    adapter = {"name": "lora", "rank": 1, "targets": ["to_k"], "freeze_a": True}
    task = task_of(site, adapter=adapter)
    own = inject(load_denoiser(site.base_model), read_adapter(adapter), 0).frozen_state()
    handle_train(site, replace(task, frozen=own))
    with pytest.raises(PolicyError, match="away from the study's first ones"):
        handle_train(site, replace(task, frozen=moved(own, 1.0)))


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"steps": 1, "batch_size": 1}, "batch_size"),
        ({"steps": 1000, "batch_size": 1}, "batch_size"),
        ({"steps": 1, "batch_size": 32}, "steps times"),
        ({"learning_rate": 1.0}, "learning_rate"),
    ],
)
@pytest.mark.attack
def test_by_default_no_update_of_few_visits_leaves(training: dict[str, Any], words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        check_study(PolicyConfig(), from_mapping(StudyConfig, {"training": training}))
    check_study(PolicyConfig(), from_mapping(StudyConfig, {}))


@pytest.mark.attack
def test_an_update_of_too_few_patients_stays(site: SiteConfig) -> None:
    task = task_of(site, training={"steps": 1, "batch_size": 1})
    with pytest.raises(PolicyError, match="of fewer patients"):
        handle_train(replace(site, policy=replace(site.policy, min_patients=2)), task)
    handle_train(replace(site, policy=replace(site.policy, min_patients=1)), task)


PRIVATE: dict[str, Any] = {
    "privacy": {"enabled": True, "patients": 3, "expected_batch_size": 2, "target_delta": 0.01},
    "federation": {**OPTIONS["federation"], "weighting": "equal"},
}


def test_a_private_round_is_refused_where_a_site_computes_blocks_again(site: SiteConfig) -> None:
    """Nothing is charged: the ledger is as it was."""
    saving = replace(site, gradient_checkpointing=True)
    task = task_of(site, **PRIVATE)
    with pytest.raises(PrivacyError, match="gradient_checkpointing of the site's config"):
        handle_train(saving, task)
    assert not Ledger(site.ledger_path).cohorts()


def test_batches_that_make_one_step_count_for_the_policy(site: SiteConfig) -> None:
    policy = replace(site.policy, max_batch_size=8, min_batch_size=6)
    for batches, allowed in ((1, False), (3, True), (4, True), (5, False)):
        options = {**OPTIONS, "training": {"steps": 3, "batch_size": 2, "gradient_accumulation": batches}}
        study = from_mapping(StudyConfig, options)
        if allowed:
            check_study(policy, study)
        else:
            with pytest.raises(PolicyError, match="visits in a step"):
                check_study(policy, study)
    with pytest.raises(ConfigError, match=r"set training\.gradient_accumulation to 1"):
        from_mapping(StudyConfig, OPTIONS, {**PRIVATE, "training": {"gradient_accumulation": 2}})
