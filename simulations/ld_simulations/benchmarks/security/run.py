"""Runs the security benchmark and writes its page."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ld_common.core.config import to_mapping
from ld_simulations.benchmarks.harness import Harness, ResultStore, claim_plan
from ld_simulations.benchmarks.security.attempts import run_attempts
from ld_simulations.benchmarks.security.fuzz import Fuzzer, batches
from ld_simulations.benchmarks.security.plan import SecurityConfig
from ld_simulations.benchmarks.security.report import write_report

DECIDES = ("files", "seed", "hang_seconds", "memory_mib")


def run(config: SecurityConfig, only_report: bool, console: Console) -> list[Path]:
    """Do the parts that have no result yet, and write the page; returns its files."""
    output = Path(config.output).resolve()
    store = ResultStore(output)
    plan: dict[str, Any] = to_mapping(config)
    if not only_report:
        claim_plan(output, {key: plan[key] for key in DECIDES})
        harness = Harness(store, console, config.workers)
        if "fuzz" in config.parts:
            harness.run("files", batches(config), partial(Fuzzer, config), Fuzzer.run)
        if "attempts" in config.parts:
            harness.once("attempts", partial(run_attempts, Path(config.project), config.workers))
    return write_report(store, config)
