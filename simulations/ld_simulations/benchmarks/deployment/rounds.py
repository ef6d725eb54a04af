"""A deployed study run to its release, resumed or unbroken, and the cost of its rounds beyond bare training."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ld_client.data.store import open_store
from ld_client.site_config import load_modality, load_site
from ld_client.train import computing, train_round
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.errors import DeploymentError
from ld_common.core.processes import environment
from ld_common.diffusion.base_model import load_denoiser
from ld_common.diffusion.training import TrainingData
from ld_common.release.release import ADAPTER
from ld_server.round_log import RELEASE, ROUNDS
from ld_simulations.benchmarks.deployment.soak import LINK
from ld_simulations.benchmarks.deployment.stage import RUN, SERVER, Deployment
from ld_simulations.demo import Demo
from ld_simulations.preparation import prepare_sites

RUN_SECONDS = 900.0
POLL_SECONDS = 0.1


def run_to_release(stage: Deployment, kill_after_round: int = 0) -> bytes:
    """Run a served deployment's study; returns the adapter's bytes.

    Args:
        stage: served, its sites not started yet.
        kill_after_round: SIGKILL the SuperLink and every process of the run once this round is in the checkpoint, and
            start it again with `--resume`; 0 lets it run unbroken.

    Raises:
        DeploymentError: it ends without a release, or takes too long.
    """
    for name in stage.sites:
        stage.start(name)
    stage.start(RUN)
    if kill_after_round:
        _wait_for_round(stage, kill_after_round)
        stage.kill_below(SERVER, LINK)
        stage.kill_below(SERVER, "flwr-serverapp")
        stage.kill(RUN)
        time.sleep(1.0)
        stage.wait_for_link()
        stage.start(RUN, "--resume")
    if stage.wait(RUN, RUN_SECONDS):
        raise DeploymentError(f"the study ended without a release: {stage.log(RUN)[-400:]}")
    return (stage.home.run / RELEASE / ADAPTER).read_bytes()


def rounds_of(stage: Deployment) -> list[dict[str, Any]]:
    """The records of the rounds so far."""
    path = stage.home.run / ROUNDS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def overhead(demo: Demo, rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of the parts of a deployed round, medians over the rounds after the first.

    `bare_seconds` is the training loop of every site, one after the other, in this process;
    `slowest_site_task_seconds` is the longest task of a site, by its own clock; `outside_tasks_seconds` is the rest:
    Flower's polling and transport, and the start of each task.
    """
    later = rounds[1:] or rounds
    torch.set_num_threads(1)  # as the sites' processes have
    configs = prepare_sites(demo)
    bare = sum(bare_loop(demo, configs / f"{name}.yaml") for name in demo.study.federation.sites)
    inside = [max(site["seconds"] for site in record["sites"].values()) for record in later]
    whole = [record["seconds"] for record in later]
    return {
        "round_seconds": statistics.median(whole),
        "slowest_site_task_seconds": statistics.median(inside),
        "outside_tasks_seconds": statistics.median(total - task for total, task in zip(whole, inside, strict=True)),
        "process_start_seconds": _process_start(),
        "bare_seconds": bare,
    }


def bare_loop(demo: Demo, file: Path) -> float:
    """Seconds of one round's training loop at a site, without anything around it."""
    site, study = load_site(file), demo.study
    store = open_store(site.store_path)
    adapted = inject(load_denoiser(site.base_model, site.device), read_adapter(study.adapter), study.seed)
    data = TrainingData(
        store.latents,
        store.prompts,
        patients=store.pseudonyms,
        condition_vectors=store.condition_vectors(load_modality(site)),
    )
    once = dataclasses.replace(study, training=dataclasses.replace(study.training, steps=1))
    train_round(adapted, data, once, 1, site.site, computing(site))  # the first step allocates
    started = time.perf_counter()
    train_round(adapted, data, study, 1, site.site, computing(site))
    return time.perf_counter() - started


def _process_start() -> float:
    """Seconds of importing what a task needs, which a site does once (`launcher.fork_tasks`), or on a GPU for each."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "from ld_client.deployment.launcher import load_libraries; load_libraries()"],
        check=True,
        env=environment(Path.cwd()),
    )
    return time.perf_counter() - started


def _wait_for_round(stage: Deployment, number: int) -> None:
    deadline = time.monotonic() + RUN_SECONDS
    while len(rounds_of(stage)) < number:
        if stage.ended(RUN) is not None or time.monotonic() > deadline:
            raise DeploymentError(f"round {number} never ended: {stage.log(RUN)[-400:]}")
        time.sleep(POLL_SECONDS)
