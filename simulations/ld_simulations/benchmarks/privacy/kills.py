"""SIGKILL a site's process at random moments of a round, and compare its ledger with what it sent."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

from ld_client.data.store import open_store
from ld_client.privacy.ledger import Ledger, private_charges
from ld_client.round import handle_train
from ld_client.site_config import SiteConfig
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.config import from_mapping, to_mapping
from ld_common.core.errors import FederationError
from ld_common.diffusion.base_model import base_digest, load_denoiser
from ld_common.protocol.dp_accounting import Charge, epsilon
from ld_common.protocol.messages import TrainTask
from ld_common.protocol.study_config import StudyConfig

UNLIMITED, MANY = 1e9, 10**9
DELTA = 1e-5
POLL_SECONDS = 0.002
SOON = 0.05
"""Share of a round after its charge in which it is not yet sent."""


@dataclass(frozen=True)
class Kills:
    """Outcome of a number of kills."""

    kills: int
    under_counts: int
    """Kills after which the ledger's ε was below that of what was sent."""
    lost: int
    """Rounds that were charged and not sent, because the kill fell between the two."""


def small_task(site: SiteConfig, number: int = 0) -> TrainTask:
    """The first private round, of two steps, of one of many studies on a site's store."""
    study = from_mapping(
        StudyConfig,
        {
            "adapter": {"name": "lora", "rank": 1, "targets": ["to_k"]},
            "training": {"steps": 2},
            "name": f"small {number}",
            "federation": {"weighting": "equal", "rounds": 2},
            "privacy": {
                "enabled": True,
                "patients": 10,
                "expected_batch_size": 2,
                "target_delta": 1e-5,
                "augmentation_multiplicity": 1,
            },
        },
    )
    adapted = inject(load_denoiser(site.base_model), read_adapter(study.adapter), study.seed)
    return TrainTask(
        adapted.trainable_state(),
        1,
        json.dumps(to_mapping(study)),
        base_digest(site.base_model),
        open_store(site.store_path).modality_digest,
    )


def kill_rounds(site: SiteConfig, kills: int, seed: int) -> Kills:
    """Kill a site's process in the middle of `small_task`, many times.

    Raises:
        FederationError: a process ended before it was killed.
    """
    # forked processes cannot use threads of OpenMP that their parent has started, so the parent must never start any
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_kill_rounds, site, kills, seed).result()
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        os.environ.update({} if threads is None else {"OMP_NUM_THREADS": threads})


def _kill_rounds(site: SiteConfig, kills: int, seed: int) -> Kills:
    """Start a site's process on a study of its own, kill it, compare, again and again.

    Every other time the moment is drawn from two rounds, of which the first releases a drift too, the other times from
    just after the next charge, before the round is sent. The process answers rounds until it dies; a round counts as
    sent once its answer is in the pipe.
    """
    context, chance = multiprocessing.get_context("fork"), random.Random(seed)
    site = replace(site, policy=replace(site.policy, max_epsilon=UNLIMITED, max_rounds=MANY, repeated_rounds=MANY))
    ledger = Ledger(site.ledger_path)
    handle_train(site, small_task(site, kills))  # finds the noise multiplier once for all forks
    started = time.monotonic()
    handle_train(site, small_task(site, kills + 1))
    round_seconds = time.monotonic() - started
    under_counts = lost = 0
    for done in range(kills):
        task = small_task(site, done)
        study = from_mapping(StudyConfig, json.loads(task.study))
        receiver, sender = context.Pipe(duplex=False)
        run = context.Process(target=_answer, args=(site, task, sender))
        run.start()
        sender.close()
        receiver.recv_bytes()
        if done % 2:
            while not _charges(ledger, study) and run.is_alive():
                time.sleep(POLL_SECONDS)
        time.sleep(chance.uniform(0, (SOON if done % 2 else 2) * round_seconds))
        run.kill()
        run.join()
        if run.exitcode != -signal.SIGKILL:
            raise FederationError(f"the site's process ended by itself, with code {run.exitcode}: nothing was tested")
        sent, charged = _received(receiver), _charges(ledger, study)
        under_counts += _epsilon(charged) < _epsilon(_sent(study, sent))
        lost += sum(charge.steps == study.training.steps for charge in charged) - sent
    return Kills(kills, under_counts, lost)


def _answer(site: SiteConfig, task: TrainTask, sender: Connection) -> None:
    while True:
        sender.send_bytes(b"start")
        handle_train(site, task)
        sender.send_bytes(b"sent")


def _charges(ledger: Ledger, study: StudyConfig) -> tuple[Charge, ...]:
    """Charges of a study in the ledger."""
    return tuple(private_charges([entry for entry in ledger.entries() if entry.study_digest == study.digest()]))


def _sent(study: StudyConfig, rounds: int) -> tuple[Charge, ...]:
    """Charges of a number of rounds; the first one includes the drift."""
    planned = study.privacy_plan()
    drift = [planned.drift] if planned.drift and rounds else []
    return tuple([*[replace(planned.step, steps=study.training.steps)] * rounds, *drift])


@functools.cache
def _epsilon(charges: tuple[Charge, ...]) -> float:
    return epsilon(charges, DELTA)


def _received(receiver: Connection) -> int:
    """Number of rounds that were sent before the process died."""
    sent = 0
    try:
        while True:
            sent += receiver.recv_bytes() == b"sent"
    except EOFError:
        return sent
