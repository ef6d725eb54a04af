"""Rounds of a simulated federation against the bare training loops of its sites, side by side at one thread each."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from ld_simulations.benchmarks.deployment.rounds import bare_loop
from ld_simulations.demo import Demo, load_demo
from ld_simulations.federation import run_federation
from ld_simulations.preparation import prepare_sites

SITES = ("aster", "birch")
ROUNDS = 4
"""The first is not counted: in it the sites' processes import what they need."""


def measure_simulated_round(config: str, steps: int, folder: Path) -> dict[str, Any]:
    """Median seconds of the counted rounds, of the sites' loops at the same time, and their ratio.

    Args:
        config: YAML of a demo.
        steps: of a round at a site.
        folder: empty; for hospitals, stores and the study.
    """
    study = [f"federation.sites=[{','.join(SITES)}]", f"federation.rounds={ROUNDS}", "drift.shape=none"]
    demo = load_demo(Path(config), [f"output={folder}", f"training.steps={steps}", "patients=12", *study])
    configs = prepare_sites(demo)
    records: list[dict[str, Any]] = []
    run_federation(demo, on_round=records.append)
    rounds = [record["seconds"] for record in records[1:]]
    bare = [_side_by_side(demo, configs) for _ in rounds]
    return {
        "steps": steps,
        "sites": len(SITES),
        "round_seconds": rounds,
        "bare_seconds": bare,
        "round_over_bare_loop": median(rounds) / median(bare),
    }


def _side_by_side(demo: Demo, configs: Path) -> float:
    """Seconds of the slowest site's loop, while all run, a process each."""
    with ProcessPoolExecutor(len(SITES), multiprocessing.get_context("spawn")) as pool:
        started = [pool.submit(_timed, demo, configs / f"{name}.yaml") for name in SITES]
        return max(future.result() for future in started)


def _timed(demo: Demo, file: Path) -> float:
    import torch

    torch.set_num_threads(1)
    time.sleep(1.0)  # both have imported by then
    return bare_loop(demo, file)
