"""SIGKILL a site's process at random moments of a round: does its ledger ever hold less than was sent?"""

from __future__ import annotations

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
from ld_client.local_round import run_task
from ld_client.privacy.ledger import TRAINING, Ledger
from ld_client.site import SiteConfig
from ld_common.config import from_mapping, to_mapping
from ld_common.errors import FederationError
from ld_common.messages import TrainTask
from ld_common.models import base_digest, load_denoiser
from ld_common.schemes import attach, read_scheme
from ld_common.study import StudyConfig

UNLIMITED = 1e9
POLL_SECONDS = 0.002
SOON = 0.05
"""Part of a round after its charge in which it is not yet sent."""


@dataclass(frozen=True)
class Kills:
    """What came of a number of kills."""

    kills: int
    under_counts: int
    """Kills after which the ledger held fewer or weaker charges than rounds were sent."""
    lost: int
    """Rounds that were charged and never sent: each of these kills fell between the two."""


def small_task(site: SiteConfig) -> TrainTask:
    """A private round of two steps on a site's store."""
    study = from_mapping(
        StudyConfig,
        {
            "scheme": {"rank": 1, "targets": ["to_k"]},
            "training": {"steps": 2},
            "federation": {"weighting": "equal", "rounds": 2},
            "privacy": {"enabled": True, "patients": 10, "batch_patients": 2, "delta": 1e-5, "draws": 1},
        },
    )
    attached = attach(load_denoiser(site.base_model), read_scheme(study.scheme), study.seed)
    return TrainTask(
        attached.learned_state(),
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
    kept = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_kill_rounds, site, kills, seed).result()
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        os.environ.update({} if kept is None else {"OMP_NUM_THREADS": kept})


def _kill_rounds(site: SiteConfig, kills: int, seed: int) -> Kills:
    """Start a site's process, kill it, compare, again and again.

    Every other time the moment is drawn from two rounds, the other times from just after the next charge, before the
    round is sent. The process answers rounds until it dies; a round counts as sent once its answer is in the pipe.
    """
    task = small_task(site)
    context, chance = multiprocessing.get_context("fork"), random.Random(seed)
    site = replace(site, policy=replace(site.policy, max_epsilon=UNLIMITED))
    ledger = Ledger(site.ledger_path)
    before = _charged(ledger, 0.0)
    run_task(site, task)  # solves the noise once for all forks
    started = time.monotonic()
    run_task(site, task)
    round_seconds = time.monotonic() - started
    least = from_mapping(StudyConfig, json.loads(task.study)).privacy_plan().step.noise_multiplier
    sent, under_counts = 2, 0
    for done in range(kills):
        receiver, sender = context.Pipe(duplex=False)
        run = context.Process(target=_answer, args=(site, task, sender))
        run.start()
        sender.close()
        receiver.recv_bytes()
        if done % 2:
            charged = _charged(ledger, least)
            while _charged(ledger, least) == charged and run.is_alive():
                time.sleep(POLL_SECONDS)
        time.sleep(chance.uniform(0, (SOON if done % 2 else 2) * round_seconds))
        run.kill()
        run.join()
        if run.exitcode != -signal.SIGKILL:
            raise FederationError(f"the site's process ended by itself, with code {run.exitcode}: nothing was tested")
        sent += _received(receiver)
        under_counts += _charged(ledger, least) - before < sent
    return Kills(kills, under_counts, _charged(ledger, least) - before - sent)


def _answer(site: SiteConfig, task: TrainTask, sender: Connection) -> None:
    while True:
        sender.send_bytes(b"start")
        run_task(site, task)
        sender.send_bytes(b"sent")


def _charged(ledger: Ledger, least: float) -> int:
    """Rounds that are charged with no more noise than was added."""
    charges = [entry.charge for entry in ledger.entries() if entry.purpose == TRAINING]
    return sum(charge is not None and (not least or charge.noise_multiplier <= least) for charge in charges)


def _received(receiver: Connection) -> int:
    """How many rounds were sent before the process died."""
    sent = 0
    try:
        while True:
            sent += receiver.recv_bytes() == b"sent"
    except EOFError:
        return sent
