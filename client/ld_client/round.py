"""One round at a site: what is asked is checked against the site's own policy, base and store, charged, and trained."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ld_client.data.store import INDEX, Store, open_store, split_store
from ld_client.policy import check_hours, check_size, check_store, check_study, within_memory
from ld_client.privacy.dp_drift import drift_release, paid_drift
from ld_client.privacy.dp_sgd import check_trainable, train_round_privately
from ld_client.privacy.ledger import TRAINING, Ledger, RoundLimit, Use
from ld_client.privacy.secagg_round import SecaggSiteRound
from ld_client.site_config import SiteConfig, load_modality
from ld_client.site_drift import site_drift, site_prior
from ld_client.train import train_round
from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.registry import read_adapter
from ld_common.adapters.state_dict import check_state
from ld_common.core.atomic_files import file_digest
from ld_common.core.errors import FederationError, ModelError, PolicyError
from ld_common.diffusion.base_model import base_digest, load_denoiser
from ld_common.diffusion.drift import LatentDrift, entering
from ld_common.diffusion.training import TrainingData
from ld_common.protocol.messages import TrainNumbers, TrainResult, TrainTask
from ld_common.protocol.study_config import StudyConfig, study_from_json
from ld_common.release.data_ranges import site_coverage


@dataclass(frozen=True)
class DataUsage:
    """Which data a round is about to train on; for the site's own books."""

    study: StudyConfig
    store: str
    """SHA-256 of the store's index, which names its latents by their hash."""
    patients: int
    visits: int
    noise_multiplier: float | None
    """None without differential privacy."""


def handle_train(
    site: SiteConfig,
    task: TrainTask,
    secure: SecaggSiteRound | None = None,
    before_training: Callable[[DataUsage], None] = lambda use: None,
) -> TrainResult:
    """Check a task against the site's own base and store, train, and return what may leave.

    Args:
        site: the site.
        task: what it is asked.
        secure: its part in secure aggregation, for a study that asks for it.
        before_training: told which data are used, after they were charged for and before they are.

    Raises:
        LdError: the study, base, modality or adapter is not what the site holds, or the policy forbids it.
    """
    check_hours(site.policy)
    with within_memory(site.policy):
        return _handle_train(site, task, secure, before_training)


def _handle_train(
    site: SiteConfig, task: TrainTask, secure: SecaggSiteRound | None, before_training: Callable[[DataUsage], None]
) -> TrainResult:
    started = time.monotonic()
    study = study_from_json(task.study)
    check_study(site.policy, study)
    if not 1 <= task.round <= study.federation.rounds:
        raise PolicyError(f"round {task.round} is none of the study's {study.federation.rounds}")
    if base_digest(site.base_model) != task.base_digest:
        raise ModelError(f"the study's base model is not '{site.base_model}': point base_model at the study's base")
    store = open_store(site.store_path, base_digest=task.base_digest, modality_digest=task.modality_digest)
    store, _ = split_store(store, site.held_out)
    check_store(site.policy, store, study)
    model, adapter = load_denoiser(site.base_model, site.device), read_adapter(study.adapter)
    adapted = inject(model, adapter, study.seed)
    check_size(site.policy, adapted)
    check_state(task.state, adapted.trainable_state())
    if task.frozen:
        check_state(task.frozen, adapted.frozen_state())
    if study.federation.secure_aggregation:
        if secure is None or task.secure is None:
            raise FederationError("the study asks for secure aggregation and the task comes without it: refused")
        secure.open(task.secure, study.digest(), task.round)
    noise_multiplier = spend(site, store, study, adapted, task.round)
    patients, visits = len(set(store.pseudonyms)), len(store.latents)
    before_training(DataUsage(study, file_digest(site.store_path / INDEX), patients, visits, noise_multiplier))
    # until the state is loaded, `model` draws as the plain base does
    private = study.privacy.enabled
    modality = load_modality(site)
    drift = paid_drift(site, store, study) if private else site_drift(site, modality, store, model, study)
    prior = None if adapter.prior is None else site_prior(site, store, model, adapter.prior, study.seed)
    adapted.load({**task.frozen, **task.state})
    entered = None if drift is None else entering(drift, study.drift.formulation)
    own = entered if isinstance(entered, LatentDrift) else None
    lesson = TrainingData(store.latents, store.prompts, own, prior, store.pseudonyms, store.condition_vectors(modality))
    numbers = None
    if noise_multiplier is not None:
        train_round_privately(adapted, lesson, study, task.round, noise_multiplier)
    else:
        losses = train_round(adapted, lesson, study, task.round, site.site, site.precision)
        if not study.withholds_numbers:
            covered = site_coverage(load_modality(site), store.pseudonyms, store.attributes, site.policy.min_patients)
            seconds = time.monotonic() - started
            numbers = TrainNumbers(visits, patients, losses.first, losses.last, seconds, covered)
    state = adapted.trainable_state()
    if study.federation.secure_aggregation and secure is not None:
        update = {name: value - task.state[name] for name, value in state.items()}
        return TrainResult(site.site, task.round, {}, None, numbers, secure.mask(update, drift))
    return TrainResult(site.site, task.round, state, drift, numbers)


def spend(
    site: SiteConfig, store: Store, study: StudyConfig, adapted: AdaptedModel[Any], round_number: int
) -> float | None:
    """Charge a round to the data set's ledger, before it runs; returns its noise multiplier, None without privacy.

    Raises:
        PolicyError: the study has trained as many rounds here as the policy allows.
        PrivacyError: the budget does not allow it, or the adapter cannot be trained privately; nothing is charged.
    """
    policy = site.policy
    use = Use(study.name, study.digest(), round_number, {TRAINING: None})
    most = RoundLimit(policy.max_rounds, "policy.max_rounds")
    noise_multiplier = None
    if study.privacy.enabled:
        check_trainable(adapted)
        planned = study.privacy_plan()
        noise_multiplier = planned.step.noise_multiplier
        step = replace(planned.step, steps=study.training.steps)
        drift = None if planned.drift is None else drift_release(store, study, planned.drift)
        use = replace(use, charges={TRAINING: step}, drift=drift, plan=planned.charges)
        own = study.federation.rounds + policy.repeated_rounds
        if own < most.rounds:
            most = RoundLimit(own, "the study's rounds and policy.repeated_rounds")
    Ledger(site.ledger_path).charge(use, policy.max_epsilon, policy.delta, most)
    return noise_multiplier
