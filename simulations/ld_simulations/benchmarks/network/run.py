"""`ld-benchmark network`: trains the study's adapter, asks it what the closed form is asked, and writes the page."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ld_common.core.atomic_files import write_bytes
from ld_common.core.config import to_mapping
from ld_simulations.benchmarks.harness import Harness, ResultStore, claim_plan, json_bytes
from ld_simulations.benchmarks.network.judge import (
    CLOSED,
    COPY,
    GAUSSIAN,
    NETWORK,
    OTHERS,
    TRUE,
    UNTRAINED,
    NetworkJudge,
    NetworkTask,
    refinement_name,
)
from ld_simulations.benchmarks.network.plan import NetworkConfig
from ld_simulations.benchmarks.network.report import flat_numbers, page_lines

NUMBERS, PAGE = "network.json", "network.md"
ANYWHERE = ("output", "results", "workers", "trainings")
"""Keys that decide no result, or only which there are."""


def run(config: NetworkConfig, only_report: bool, console: Console) -> list[Path]:
    """Do what has no result yet, and write the page; returns its files."""
    output = Path(config.output).resolve()
    store = ResultStore(output)
    if not only_report:
        claim_plan(output, {key: value for key, value in to_mapping(config).items() if key not in ANYWHERE})
        harness, make = Harness(store, console, config.workers), partial(NetworkJudge, config, output)
        trained = NetworkJudge(config, output).file
        trainings = [NetworkTask("train", name) for name in config.trainings]
        harness.run("train", trainings, make, NetworkJudge.train, done=lambda task: trained(task.row).exists())
        harness.run("answers", tasks(config, "answers"), make, NetworkJudge.answers)
        harness.run("pictures from noise", tasks(config, "noise"), make, NetworkJudge.noise)
        harness.run("several answers", tasks(config, "draws"), make, NetworkJudge.draws)
    results: dict[str, dict[str, Any]] = {}
    for kind in ("noise", "answers", "draws"):
        found = {task.row: store.read(task.name) for task in tasks(config, kind)}
        results[kind] = {row: result for row, result in found.items() if result is not None}
    files = [Path(config.results) / NUMBERS, Path(config.results) / PAGE]
    write_bytes(files[0], json_bytes(flat_numbers(results)))
    write_bytes(files[1], "\n".join(page_lines(config, results)).encode())
    return files


def tasks(config: NetworkConfig, kind: str) -> list[NetworkTask]:
    """The rows of a table."""
    rows = {
        "noise": [OTHERS, GAUSSIAN, UNTRAINED, *config.trainings],
        "answers": [COPY, TRUE, CLOSED, NETWORK, *map(refinement_name, config.refinements)],
        "draws": [NETWORK],
    }
    return [NetworkTask(kind, row) for row in rows[kind]]
