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
from ld_client.site import SiteConfig, load_modality, load_site
from ld_client.site_drift import drift_is_free, site_drift, site_prior
from ld_client.store import Store, open_store
from ld_client.train import Lesson, train_round
from ld_common import messages, offline
from ld_common.adapters import check_state
from ld_common.drift import Drift, entering
from ld_common.errors import ConfigError, LdError, ModelError
from ld_common.messages import TrainNumbers, TrainResult, TrainTask
from ld_common.models import base_digest, load_denoiser
from ld_common.privacy import Charge
from ld_common.schemes import Attached, attach, read_scheme
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


def answer_join(message: Message, site_file: Callable[[], Path]) -> Message:
    """Tell the server a site's name."""
    return answer(message, site_file, lambda site: messages.pack_name(site.site))


def answer_train(message: Message, site_file: Callable[[], Path]) -> Message:
    """Train one round on a site's store."""
    return answer(
        message, site_file, lambda site: messages.pack_result(run_task(site, messages.unpack_task(message.content)))
    )


def own_site(context: Context) -> Path:
    """This node's site config; raises `ConfigError` when it has none."""
    if "site-config" not in context.node_config:
        raise ConfigError("this node has no site: start it with --node-config 'site-config=\"/path/to/site.yaml\"'")
    return Path(str(context.node_config["site-config"]))


@app.query(messages.JOIN)
def join(message: Message, context: Context) -> Message:
    """Tell the server this site's name."""
    return answer_join(message, lambda: own_site(context))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round on this site's store."""
    return answer_train(message, lambda: own_site(context))


def run_task(site: SiteConfig, task: TrainTask) -> TrainResult:
    """Check a task against the site's own base and store, train, and return what may leave.

    Raises:
        LdError: the study, base, modality or adapter is not what the site holds.
    """
    started = time.monotonic()
    study = study_from_json(task.study)
    check_study(site.policy, study)
    if base_digest(site.base_model) != task.base_digest:
        raise ModelError(f"the study's base model is not '{site.base_model}': point base_model at the study's base")
    store = open_store(site.store_path, base_digest=task.base_digest, modality_digest=task.modality_digest)
    check_store(site.policy, store, study)
    model, scheme = load_denoiser(site.base_model, site.device), read_scheme(study.scheme)
    attached = attach(model, scheme, study.seed)
    check_size(site.policy, attached)
    check_state(task.state, attached.learned_state())
    noise_multiplier = spend(site, store, study, attached, task.round)
    # until the state is loaded, `model` draws as the plain base does
    drift = site_drift(site, load_modality(site), store, model, study)
    prior = None if scheme.prior is None else site_prior(site, store, model, scheme.prior, study.seed)
    attached.load(task.state)
    entered = None if drift is None else entering(drift, study.drift.formulation)
    lesson = Lesson(store.latents, store.prompts, entered if isinstance(entered, Drift) else None, prior)
    if noise_multiplier is not None:
        train_round_privately(attached, lesson, store.pseudonyms, study, task.round, noise_multiplier)
        return TrainResult(site.site, task.round, attached.learned_state(), drift, None)
    losses = train_round(attached, lesson, study, task.round, site.site, site.precision)
    patients = len(set(store.pseudonyms))
    seconds = time.monotonic() - started
    numbers = TrainNumbers(len(store.latents), patients, losses.first, losses.last, seconds)
    return TrainResult(site.site, task.round, attached.learned_state(), drift, numbers)


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
