"""A hospital's end of the federation: a Flower ClientApp. Nothing but codes and checked tensors leaves it.

The site's own config comes from the node (`--node-config 'site-config="/path/to/site.yaml"'`), never from the server.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from ld_client.ledger import DRIFT, TRAINING, Ledger, Use
from ld_client.policy import check_size, check_store, check_study
from ld_client.private import check_trainable, train_round_privately
from ld_client.secure_round import SecureRound
from ld_client.site import SiteConfig, load_modality, load_site
from ld_client.site_drift import drift_is_free, site_drift, site_prior
from ld_client.store import Store, open_store, split_store
from ld_client.train import Lesson, train_round
from ld_common import messages, offline
from ld_common.adapters import check_state
from ld_common.drift import Drift, entering
from ld_common.errors import ConfigError, FederationError, LdError, ModelError, PolicyError
from ld_common.messages import TrainNumbers, TrainResult, TrainTask
from ld_common.models import base_digest, load_denoiser
from ld_common.privacy import Charge
from ld_common.schemes import Attached, attach, read_scheme
from ld_common.secure_aggregation import Stage
from ld_common.study import StudyConfig, study_from_json

offline.configure()
app = ClientApp()


def answer(message: Message, site_file: Callable[[], Path], handle: Callable[[SiteConfig], RecordDict]) -> Message:
    """Run a handler for a site; whatever goes wrong leaves as a code, never as an exception's text."""
    try:
        content = handle(load_site(site_file()))
    except LdError as error:
        content = messages.pack_error(error.code)
    except Exception:  # the outermost wall: an unexpected text could hold a patient's name
        content = messages.pack_error("error")
    return Message(content, reply_to=message)


def own_site(context: Context) -> Path:
    """This node's site config; raises `ConfigError` when it has none."""
    if "site-config" not in context.node_config:
        raise ConfigError("this node has no site: start it with --node-config 'site-config=\"/path/to/site.yaml\"'")
    return Path(str(context.node_config["site-config"]))


def register(client: ClientApp, site_file: Callable[[Context], Path]) -> None:
    """Give a ClientApp every answer of a site; `site_file` finds the site's config from its node."""

    @client.query(messages.JOIN)
    def join(message: Message, context: Context) -> Message:
        return answer(message, lambda: site_file(context), lambda site: messages.pack_name(site.site))

    @client.train()
    def train(message: Message, context: Context) -> Message:
        def handle(site: SiteConfig) -> RecordDict:
            task = messages.unpack_task(message.content)
            return messages.pack_result(run_task(site, task, SecureRound(context.state)))

        return answer(message, lambda: site_file(context), handle)

    for stage in (Stage.KEYS, Stage.SHARES, Stage.UNMASK):
        _register_stage(client, site_file, stage)


def _register_stage(client: ClientApp, site_file: Callable[[Context], Path], stage: Stage) -> None:
    @client.query(stage.value)
    def answer_stage(message: Message, context: Context) -> Message:
        def handle(site: SiteConfig) -> RecordDict:
            request = messages.unpack_secure(message.content) or {}
            return messages.pack_secure(SecureRound(context.state).answer(site, stage, request))

        return answer(message, lambda: site_file(context), handle)


register(app, own_site)


def run_task(site: SiteConfig, task: TrainTask, secure: SecureRound | None = None) -> TrainResult:
    """Check a task against the site's own base and store, train, and return what may leave.

    Args:
        site: the site.
        task: what it is asked.
        secure: its part in secure aggregation, for a study that asks for it.

    Raises:
        LdError: the study, base, modality or adapter is not what the site holds.
    """
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
    model, scheme = load_denoiser(site.base_model, site.device), read_scheme(study.scheme)
    attached = attach(model, scheme, study.seed)
    check_size(site.policy, attached)
    check_state(task.state, attached.learned_state())
    if study.federation.secure_aggregation:
        if secure is None or task.secure is None:
            raise FederationError("the study asks for secure aggregation and the task comes without it: refused")
        secure.open(task.secure, study.digest(), task.round)
    noise_multiplier = spend(site, store, study, attached, task.round)
    # until the state is loaded, `model` draws as the plain base does
    drift = site_drift(site, load_modality(site), store, model, study)
    prior = None if scheme.prior is None else site_prior(site, store, model, scheme.prior, study.seed)
    attached.load(task.state)
    entered = None if drift is None else entering(drift, study.drift.formulation)
    lesson = Lesson(store.latents, store.prompts, entered if isinstance(entered, Drift) else None, prior)
    numbers = None
    if noise_multiplier is not None:
        train_round_privately(attached, lesson, store.pseudonyms, study, task.round, noise_multiplier)
    else:
        losses = train_round(attached, lesson, study, task.round, site.site, site.precision)
        patients, seconds = len(set(store.pseudonyms)), time.monotonic() - started
        if not study.withholds_numbers:
            numbers = TrainNumbers(len(store.latents), patients, losses.first, losses.last, seconds)
    state = attached.learned_state()
    if study.federation.secure_aggregation and secure is not None:
        update = {name: value - task.state[name] for name, value in state.items()}
        return TrainResult(site.site, task.round, {}, None, numbers, secure.mask(update, drift))
    return TrainResult(site.site, task.round, state, drift, numbers)


def spend(
    site: SiteConfig, store: Store, study: StudyConfig, attached: Attached[Any], round_number: int
) -> float | None:
    """Charge a round to the data set's ledger, before it runs; returns its noise multiplier, None without privacy.

    Raises:
        PrivacyError: the budget does not allow it, or the scheme cannot be trained privately; nothing is charged.
    """
    charges: dict[str, Charge | None] = {TRAINING: None}
    noise_multiplier = None
    if study.privacy.enabled:
        check_trainable(attached)
        planned = study.privacy_plan()
        noise_multiplier = planned.step.noise_multiplier
        charges = {TRAINING: replace(planned.step, steps=study.training.steps)}
        if not drift_is_free(site, store, study):
            charges[DRIFT] = planned.drift
    use = Use(study.name, study.digest(), round_number, charges)
    Ledger(site.ledger_path).charge(use, site.policy.max_epsilon, site.policy.delta)
    return noise_multiplier
