"""One round at a site: the task is checked against policy, base and store, charged to the ledger, and trained."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ld_client.data.participation import record_participation
from ld_client.data.store import Store, open_store, split_store
from ld_client.data.store_index import INDEX
from ld_client.data.store_key import training_secret
from ld_client.data.withdrawals import check_consent
from ld_client.first_weights import STARTS, check_weights
from ld_client.kept_tensors import KEPT_ROUNDS, KeptTensors
from ld_client.policy import (
    check_drawn,
    check_hours,
    check_size,
    check_store,
    check_study,
    rounded_count,
    rounded_drift,
    within_memory,
)
from ld_client.privacy.dp_drift import drift_release, paid_drift
from ld_client.privacy.dp_longitudinal import longitudinal_release, paid_longitudinal
from ld_client.privacy.ledger import TRAINING, Ledger, LedgerMark, RoundLimit, Use
from ld_client.privacy.secagg_round import SecaggSiteRound
from ld_client.several_processes import process_count, train_in_processes
from ld_client.site_config import OWN_PARTS, RESIDUALS, SiteConfig, load_modality
from ld_client.site_drift import longitudinal_sums, site_drift, site_prior
from ld_client.train import computing, train_round
from ld_client.training_process import RoundWork
from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.registry import read_adapter
from ld_common.adapters.state_dict import state_digest
from ld_common.core.atomic_files import file_digest
from ld_common.core.errors import FederationError, ModelError, PolicyError, PrivacyError
from ld_common.core.state import State
from ld_common.diffusion.base_model import Denoiser, base_digest, load_denoiser
from ld_common.diffusion.drift import LatentDrift, entering
from ld_common.diffusion.training import TrainingData
from ld_common.imaging.modality import Modality
from ld_common.protocol.messages import TrainNumbers, TrainResult, TrainTask
from ld_common.protocol.study_config import BEST, StudyConfig, study_from_json
from ld_common.protocol.wire_formats import encode_state
from ld_common.release.data_ranges import site_coverage


@dataclass(frozen=True)
class DataUsage:
    """The data that a round is about to train on, for the site's audit log."""

    study: StudyConfig
    store: str
    """SHA-256 of the store's index, which names its latents by their hash."""
    patients: int
    """Patients trained on."""
    held_out_patients: int
    visits: int
    noise_multiplier: float | None
    """None without differential privacy."""
    ledger: LedgerMark
    """Of the ledger, which holds the round's charge."""


def handle_train(
    site: SiteConfig,
    task: TrainTask,
    secure: SecaggSiteRound | None = None,
    before_training: Callable[[DataUsage], None] = lambda usage: None,
) -> TrainResult:
    """Check a task, train, and return the result that may leave.

    Args:
        site: the site.
        task: the server's task.
        secure: the site's state of secure aggregation, for a study that uses it.
        before_training: called with the data of the round, after they were charged and before they are used.

    Raises:
        LdError: the study, base, modality or adapter does not match the site's, or the policy forbids the round.
    """
    check_hours(site.policy)
    with within_memory(site.policy):
        return _handle_train(site, task, secure, before_training)


def checked_study(site: SiteConfig, task: TrainTask) -> StudyConfig:
    """The study of a task that the site's policy allows, on its base; raises `LdError`."""
    study = study_from_json(task.study)
    check_study(site.policy, study)
    if not 1 <= task.round <= study.federation.rounds:
        raise PolicyError(f"round {task.round} is not one of the study's {study.federation.rounds} rounds")
    if base_digest(site.base_model) != task.base_digest:
        raise ModelError(f"the study's base model is not '{site.base_model}': point base_model at the study's base")
    return study


def checked_adapter(
    site: SiteConfig, model: Denoiser, task: TrainTask, study: StudyConfig, reached: int
) -> AdaptedModel[Denoiser]:
    """The study's adapter in the site's base, not loaded yet, when the task's weights can come of `reached` rounds.

    Raises:
        LdError: the adapter is too large, or the weights are too far from the first ones.
    """
    adapted = inject(model, read_adapter(study.site_adapter(site.site)), study.seed)
    check_size(site.policy, adapted)
    check_weights(site.policy, task, study, adapted, site.ledger_path.parent / STARTS, reached)
    return adapted


def load_weights(adapted: AdaptedModel[Denoiser], task: TrainTask, own: State) -> None:
    """Put a task's weights, and the site's own in place of some, into the adapted model; raises `AdapterError`."""
    if task.carried:
        adapted.adapter.add_to_base(adapted.model, task.carried)
    adapted.load({**task.frozen, **task.state, **own})


def own_part(site: SiteConfig, study: StudyConfig, task: TrainTask, round_number: int) -> State:
    """The factors that the site has its own of, as they were before a round; empty where the study's serve.

    Raises:
        AdapterError: their file is damaged.
    """
    expected = {name: value for name, value in task.state.items() if study.keeps(name)}
    return kept_tensors(site, OWN_PARTS, study).before(round_number, expected) if expected else {}


def kept_tensors(site: SiteConfig, kind: str, study: StudyConfig) -> KeptTensors:
    """What a site keeps of a study, `RESIDUALS` or `OWN_PARTS`."""
    return KeptTensors(site.ledger_path.parent, kind, study.digest(), site.site)


def _handle_train(
    site: SiteConfig, task: TrainTask, secure: SecaggSiteRound | None, before_training: Callable[[DataUsage], None]
) -> TrainResult:
    started = time.monotonic()
    study, processes = checked_study(site, task), process_count(site)
    store = open_store(site.store_path, base_digest=task.base_digest, modality_digest=task.modality_digest)
    store, held_out = split_store(store, site.held_out, study.privacy.enabled)
    check_store(site.policy, store, study)
    model = load_denoiser(site.base_model, site.device)
    adapted = checked_adapter(site, model, task, study, task.round - 1)
    adapter = adapted.adapter
    if study.federation.secure_aggregation:
        if secure is None or task.secure is None:
            raise FederationError("the study uses secure aggregation, but the task lacks its shares: refused")
        secure.open(task.secure, study.digest(), task.round)
    modality = load_modality(site)
    noise_multiplier = spend(site, modality, store, adapted, task)
    record_participation(site.ledger_path, study, task.round, store.pseudonyms)
    index = file_digest(site.store_path / INDEX)
    visits = len(store.latents)
    mark = Ledger(site.ledger_path).mark()
    before_training(DataUsage(study, index, store.patients, held_out.patients, visits, noise_multiplier, mark))
    private = study.privacy.enabled
    drift = _drift(site, modality, store, model, task)
    longitudinal = study.drift.shape == "longitudinal"
    prior = None if adapter.prior is None else site_prior(site, store, model, adapter.prior, study.seed)
    if drift is not None and not private and not longitudinal:
        drift = rounded_drift(site.policy, drift)
    load_weights(adapted, task, own_part(site, study, task, task.round))
    for name, parameter in adapted.trainable.items():
        parameter.requires_grad_(study.trains(name, task.round))
    entered = None if drift is None or longitudinal else entering(drift, study.drift.formulation)
    training_drift = entered if isinstance(entered, LatentDrift) else None
    vectors = store.condition_vectors(modality)
    data = TrainingData(store.latents, store.prompts, training_drift, prior, store.pseudonyms, vectors)
    losses = None
    if processes > 1:
        digests = task.base_digest, task.modality_digest, store.digest()
        start = adapted.state(), task.carried
        work = RoundWork(site, study, task.round, *digests, *start, training_drift, noise_multiplier)
        losses = train_in_processes(work, processes, adapted)
    elif noise_multiplier is not None:
        from ld_client.privacy.dp_sgd import train_round_privately  # opacus takes seconds to import

        train_round_privately(adapted, data, study, task.round, noise_multiplier)
    else:
        secret = training_secret(site.store_path)
        losses = train_round(adapted, data, study, task.round, site.site, computing(site), secret=secret)
    numbers = None
    if losses is not None:
        check_drawn(site.policy, {store.pseudonyms[row] for row in losses.rows})
        if not study.withholds_numbers:
            ranges = site_coverage(modality, store.pseudonyms, store.attributes, site.policy.min_patients)
            seconds = time.monotonic() - started
            counts = rounded_count(site.policy, visits), rounded_count(site.policy, store.patients)
            numbers = TrainNumbers(*counts, losses.first, losses.last, seconds, ranges)
    trained = adapted.trainable_state()  # of the factors that trained in this round
    state = {name: value for name, value in trained.items() if study.sends(name, task.round)}
    check_consent(site.store_path, store.pseudonyms)  # a patient may have withdrawn meanwhile
    own = {name: value for name, value in trained.items() if study.keeps(name)}
    if own:
        # any round may turn out to be the best, and its shared factors fit the site's own of that round
        most = study.federation.rounds if study.federation.keep == BEST else KEPT_ROUNDS
        kept_tensors(site, OWN_PARTS, study).write(task.round, own, most)
    released = own if site.policy.release_own_part else {}
    if study.federation.secure_aggregation and secure is not None:
        update = {name: value - task.state[name] for name, value in state.items()}
        masked = secure.mask(update, drift, study.drift.shape)
        return TrainResult(site.site, task.round, {}, None, numbers, masked, own=released)
    return TrainResult(site.site, task.round, _sent(site, study, task, state), drift, numbers, own=released)


def _sent(site: SiteConfig, study: StudyConfig, task: TrainTask, state: State) -> State:
    """A trained state as it travels; what rounding takes from it is kept for the next round."""
    residuals = kept_tensors(site, RESIDUALS, study)
    before = {name: task.state[name] for name in state}
    sent = encode_state(study.federation.wire, state, before, residuals.before(task.round, before))
    if sent.residual:
        residuals.write(task.round, sent.residual)
    return sent.tensors


def _drift(site: SiteConfig, modality: Modality, store: Store, model: Denoiser, task: TrainTask) -> Tensor | None:
    """The site's drift as it travels, but for the policy's rounding; `model` still predicts as the plain base does."""
    study = study_from_json(task.study)
    if study.drift.shape != "longitudinal":
        private = study.privacy.enabled
        return paid_drift(site, store, study) if private else site_drift(site, modality, store, model, study)
    if study.privacy.enabled:
        return paid_longitudinal(site, store, study, task.basis)
    return longitudinal_sums(modality, store, study, task.basis)


def spend(
    site: SiteConfig, modality: Modality, store: Store, adapted: AdaptedModel[Any], task: TrainTask
) -> float | None:
    """Charge a round to the ledger before it runs; returns its noise multiplier, None without privacy.

    Raises:
        AdapterError: the basis of a private longitudinal drift does not fit. Nothing is charged.
        PolicyError: the study has used up the rounds that the policy allows, or the round ran from other weights.
        PrivacyError: the budget does not allow it, or the adapter cannot be trained privately. Nothing is charged.
    """
    policy, study = site.policy, study_from_json(task.study)
    start = state_digest(task.weights)
    use = Use(study.name, study.digest(), task.round, {TRAINING: None}, task=start, cohort=store.digest())
    limit = RoundLimit(policy.max_rounds, "policy.max_rounds")
    noise_multiplier = None
    if study.privacy.enabled:
        from ld_client.privacy.dp_sgd import check_trainable  # opacus takes seconds to import

        if site.gradient_checkpointing:
            raise PrivacyError(
                "gradient_checkpointing of the site's config leaves no gradient for each patient, and privacy.enabled "
                "clips those: set it to false"
            )
        check_trainable(adapted)
        planned = study.privacy_plan()
        noise_multiplier = planned.step.noise_multiplier
        step = replace(planned.step, steps=study.training.steps)
        noised = None
        if planned.drift is not None and study.drift.shape == "longitudinal":
            noised = longitudinal_release(store, modality, study, task.basis, planned.drift)
        elif planned.drift is not None:
            noised = drift_release(store, study, planned.drift)
        use = replace(use, charges={TRAINING: step}, drift=noised, plan=planned.charges)
        planned_rounds = study.federation.rounds + policy.repeated_rounds
        if planned_rounds < limit.rounds:
            limit = RoundLimit(planned_rounds, "the study's rounds and policy.repeated_rounds")
    Ledger(site.ledger_path).charge(use, policy.max_epsilon, policy.delta, limit)
    return noise_multiplier
