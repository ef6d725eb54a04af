"""`ld-benchmark federation`: tries the methods' options on one seed, reports on others, and writes the page."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ld_common.core.atomic_files import write_bytes
from ld_common.core.config import to_mapping
from ld_simulations.benchmarks.federation.exactness import exact_aggregation_error
from ld_simulations.benchmarks.federation.judge import (
    ALONE,
    FEDERATED,
    GLOBAL_DRIFT,
    LOCAL_DRIFT,
    POOLED,
    POOLED_BATCH,
    POOLED_STEPS,
    UNTRAINED,
    FederationJudge,
    FederationTask,
)
from ld_simulations.benchmarks.federation.plan import NON_IID, FederationBenchmark
from ld_simulations.benchmarks.federation.report import EXACTNESS, flat_numbers, page_lines
from ld_simulations.benchmarks.harness import Harness, ResultStore, adopted_parts, claim_plan, json_bytes

NUMBERS, PAGE = "federation.json", "federation.md"
ANYWHERE = ("output", "results", "adopt", "workers", "splits", "methods", "seeds")
"""Keys that decide no result, or only which there are."""


def run(config: FederationBenchmark, only_report: bool, console: Console) -> list[Path]:
    """Do what has no result yet, and write the page; returns its files."""
    output = Path(config.output).resolve()
    store = ResultStore(output, adopted_parts(config.adopt, "federation"))
    trials = trial_tasks(config)
    if not only_report:
        claim_plan(output, {key: value for key, value in to_mapping(config).items() if key not in ANYWHERE})
        harness, make = Harness(store, console, config.workers), partial(FederationJudge, config)
        harness.once(EXACTNESS, exact_aggregation_error)
        harness.run("answers", answer_tasks(config), make, FederationJudge.answers)
        harness.run("options", trials, make, FederationJudge.network)
        harness.run("network", network_tasks(config, chosen(store, trials)), make, FederationJudge.network)
    options = chosen(store, trials)
    every = [*answer_tasks(config), *trials, *network_tasks(config, options)]
    parts = store.collect([EXACTNESS, *(task.name for task in every)])
    files = [Path(config.results) / NUMBERS, Path(config.results) / PAGE]
    write_bytes(files[0], json_bytes(flat_numbers(config, parts) | {"parts": parts}))
    write_bytes(files[1], "\n".join(page_lines(config, parts, options)).encode())
    return files


def answer_tasks(config: FederationBenchmark) -> list[FederationTask]:
    """Rows of the longitudinal drift."""
    return [
        FederationTask("answers", split, seed, row)
        for split in config.splits
        for seed in config.seeds
        for row in (POOLED, FEDERATED, ALONE)
    ]


def trial_tasks(config: FederationBenchmark) -> list[FederationTask]:
    """Trials of options on the tuning seed's non-IID hospitals."""
    split = NON_IID if NON_IID in config.splits else config.splits[0]
    return [
        FederationTask("trial", split, config.tuning_seed, method, tuple(options.items()))
        for method in config.methods
        for options in config.tried.get(method, ())
    ]


def chosen(store: ResultStore, trials: list[FederationTask]) -> dict[str, dict[str, Any]]:
    """Each tried method's options of the least mean loss; those that are done."""
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for task in trials:
        losses = store.read(task.name)
        if losses is not None:
            tried = float(np.mean(list(losses.values()))), dict(task.options)
            best[task.row] = min(best.get(task.row, tried), tried, key=lambda pair: pair[0])
    return {method: options for method, (_, options) in best.items()}


def network_tasks(config: FederationBenchmark, options: dict[str, dict[str, Any]]) -> list[FederationTask]:
    """Rows of the network."""
    rows = [UNTRAINED, POOLED_BATCH, POOLED_STEPS, ALONE, LOCAL_DRIFT, GLOBAL_DRIFT, *config.methods]
    return [
        FederationTask("network", split, seed, row, tuple(options.get(row, {}).items()))
        for split in config.splits
        for seed in config.seeds
        for row in rows
    ]
