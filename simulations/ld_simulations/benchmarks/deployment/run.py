"""`ld-benchmark deployment`: run each part that has no result yet, and write the page."""

from __future__ import annotations

import functools
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_simulations.benchmarks.deployment.intruders import try_intruders
from ld_simulations.benchmarks.deployment.plan import DeploymentBenchmark, adopted_results
from ld_simulations.benchmarks.deployment.report import write_report
from ld_simulations.benchmarks.deployment.rounds import overhead, rounds_of, run_to_release
from ld_simulations.benchmarks.deployment.soak import Soak
from ld_simulations.benchmarks.deployment.stage import Deployment
from ld_simulations.benchmarks.harness import Harness, ResultStore
from ld_simulations.demo import Demo
from ld_simulations.preparation import prepare_sites

ROUNDS, KILLED_AFTER = 4, 2
PLAIN = ["privacy.enabled=false", f"federation.rounds={ROUNDS}", "training.steps=10"]
"""A study without privacy, whose noise comes from the operating system: no two private runs are the same."""


def run(benchmark: DeploymentBenchmark, only_report: bool, console: Console) -> list[Path]:
    """Run the parts that have no result yet, unless `only_report`, and write the page; returns the files."""
    store = ResultStore(benchmark.output, adopted_results(benchmark))
    if not only_report:
        harness = Harness(store, console)
        for part in benchmark.config.parts:
            console.print(f"[bold]{part}")
            harness.once(part, functools.partial(RUNNERS[part], benchmark, harness))
    return write_report(store, Path(benchmark.config.results))


def _soak(benchmark: DeploymentBenchmark, harness: Harness) -> dict[str, Any]:
    config, stage = benchmark.config, _deploy(benchmark, benchmark.demo(), "soak")
    with stage.served():
        report = functools.partial(_print, harness.console)
        seen = Soak(stage, config.seed, report).run(config.minutes * 60, config.least_kills)
    return asdict(seen) | {"kills": dict(sorted(seen.kills.items())), "sites": len(stage.sites)}


def _intruders(benchmark: DeploymentBenchmark, harness: Harness) -> dict[str, Any]:
    stage = _deploy(benchmark, benchmark.demo(), "intruders")
    with stage.served():
        for name in stage.sites:
            stage.start(name)
        refused = try_intruders(stage)
    for name, was_refused in refused.items():
        _print(harness.console, f"{name}: {'refused' if was_refused else 'GOT IN'}")
    return {"attempts": refused}


def _resume(benchmark: DeploymentBenchmark, harness: Harness) -> dict[str, Any]:
    adapters, rounds = [], {}
    for name, killed_after in (("unbroken", 0), ("resumed", KILLED_AFTER)):
        stage = _deploy(benchmark, benchmark.demo(PLAIN), name)
        with stage.served():
            adapters.append(run_to_release(stage, killed_after))
        rounds[name] = rounds_of(stage)
        _print(harness.console, f"{name}: {len(rounds[name])} rounds, adapter of {len(adapters[-1])} bytes")
    return {"identical": adapters[0] == adapters[1], "rounds": ROUNDS, "killed_after_round": KILLED_AFTER, **rounds}


def _overhead(benchmark: DeploymentBenchmark, harness: Harness) -> dict[str, Any]:
    resume = harness.once("resume", functools.partial(_resume, benchmark, harness))
    return overhead(benchmark.demo(PLAIN), resume["unbroken"])


RUNNERS = {"soak": _soak, "intruders": _intruders, "resume": _resume, "overhead": _overhead}


def _deploy(benchmark: DeploymentBenchmark, demo: Demo, name: str) -> Deployment:
    folder = benchmark.output / "deployed" / name
    shutil.rmtree(folder, ignore_errors=True)
    return Deployment(demo.study_file, demo.study_overrides, prepare_sites(demo), folder)


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)
