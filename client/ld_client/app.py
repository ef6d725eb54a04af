"""A hospital's end of the federation: a Flower ClientApp. Nothing but codes and checked tensors leaves it.

The site's own config comes from the node (`site-config` in the node config). In a simulation, where one process
plays every hospital, it is the file of the node's number in the folder that the run names (`sites`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from ld_client.site import SiteConfig, load_site
from ld_client.store import Store, open_store
from ld_client.train import train_round
from ld_common import messages, offline, schemes
from ld_common.adapters import check_state
from ld_common.drift import drift_from_moments
from ld_common.errors import ConfigError, LdError, ModelError, PolicyError
from ld_common.messages import TrainResult, TrainTask
from ld_common.models import base_digest, load_unet
from ld_common.study import study_from_json

offline.configure()
app = ClientApp()


def answer(message: Message, context: Context, handle: Callable[[SiteConfig], RecordDict]) -> Message:
    """Run a handler for this node's site; whatever goes wrong leaves as a code, never as an exception's text."""
    try:
        content = handle(load_site(site_config_path(context)))
    except LdError as error:
        print(f"{error.code}: {error}", flush=True)
        content = messages.pack_error(error.code)
    except Exception as error:  # the outermost wall: an unexpected text could hold a patient's name
        print(f"unexpected {type(error).__name__}", flush=True)
        content = messages.pack_error("error")
    return Message(content, reply_to=message)


def site_config_path(context: Context) -> Path:
    """This node's site config; raises `ConfigError` when it has none."""
    if "site-config" in context.node_config:
        return Path(str(context.node_config["site-config"]))
    if "partition-id" in context.node_config:
        files = sorted(Path(str(context.run_config.get("sites", ""))).glob("*.yaml"))
        number = int(context.node_config["partition-id"])
        if number < len(files):
            return files[number]
    raise ConfigError("this node has no site: start it with --node-config 'site-config=\"/path/to/site.yaml\"'")


@app.query(messages.JOIN)
def join(message: Message, context: Context) -> Message:
    """Tell the server this site's name."""
    return answer(message, context, lambda site: messages.pack_name(site.site))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round on this site's store."""
    return answer(
        message, context, lambda site: messages.pack_result(run_task(site, messages.unpack_task(message.content)))
    )


def run_task(site: SiteConfig, task: TrainTask) -> TrainResult:
    """Check a task against the site's own base and store, train, and return what may leave.

    Raises:
        LdError: the study, base, modality or adapter is not what the site holds.
    """
    started = time.monotonic()
    study = study_from_json(task.study)
    if base_digest(site.base_model) != task.base_digest:
        raise ModelError(f"the study's base model is not '{site.base_model}': point base_model at the study's base")
    store = open_store(site.store_path)
    check_store(store, task)
    unet, scheduler = load_unet(site.base_model)
    schemes.attach(unet, study.scheme, study.seed)
    check_state(task.state, schemes.learned_state(unet))
    schemes.load_state(unet, task.state)
    losses = train_round(unet, scheduler, store, study, task.round, site.site)
    return TrainResult(
        site=site.site,
        round=task.round,
        state=schemes.learned_state(unet),
        drift=drift_from_moments(store.latents, store.base_latent_mean, study.drift.mean),
        visits=len(store.latents),
        patients=len(set(store.pseudonyms)),
        loss_first=losses.first,
        loss_last=losses.last,
        seconds=time.monotonic() - started,
    )


def check_store(store: Store, task: TrainTask) -> None:
    """Refuse a task whose base or modality is not the one that the store was made with; raises `PolicyError`."""
    if store.base_digest != task.base_digest:
        raise PolicyError("the store was made with another base model: run ld-client index again")
    if store.modality_digest != task.modality_digest:
        raise PolicyError("the study's modality is not the one that this site indexed: compare the modality files")
