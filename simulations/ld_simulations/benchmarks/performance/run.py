"""`ld-benchmark performance`: do each part that has no result yet, and write the page."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.core.config import to_mapping
from ld_common.core.errors import ConfigError
from ld_simulations.benchmarks.harness import Harness, ResultStore, adopted_parts, claim_plan, this_machine
from ld_simulations.benchmarks.performance import deployed, ray_cluster, stub_nodes
from ld_simulations.benchmarks.performance.generation import measure_generation
from ld_simulations.benchmarks.performance.plan import PerformanceConfig
from ld_simulations.benchmarks.performance.report import write_report
from ld_simulations.benchmarks.performance.scale import measure_scale
from ld_simulations.benchmarks.performance.simulated import measure_simulated_round
from ld_simulations.benchmarks.performance.training import measure_training
from ld_simulations.benchmarks.performance.wire import measure_wire
from ld_simulations.run_folder import SUMMARY

NOT_DECIDING = ("output", "results", "adopt", "parts", "demo")
DEMO_NUMBERS = ("seconds_total", "first_picture_seconds", "peak_rss_mb")


def run(config: PerformanceConfig, only_report: bool, console: Console) -> list[Path]:
    """Do the parts that have no result yet, unless `only_report`, and write the page; returns the files."""
    output = Path(config.output).resolve()
    store = ResultStore(output, adopted_parts(config.adopt, "performance"))
    if not only_report:
        plan: dict[str, Any] = to_mapping(config)
        claim_plan(output, {key: value for key, value in plan.items() if key not in NOT_DECIDING})
        harness = Harness(store, console)
        for part in config.parts:
            console.print(f"[bold]{part}")
            with tempfile.TemporaryDirectory(prefix="ld-") as folder:
                work = _work(config, Path(folder), partial(console.print, soft_wrap=True, markup=False))[part]
                harness.once(part, lambda work=work: work() | this_machine())  # type: ignore[misc]
    return write_report(store, Path(config.results))


def _work(config: PerformanceConfig, folder: Path, report: Callable[[str], None]) -> dict[str, Callable[[], Any]]:
    """By part, what is done in an empty folder."""
    return {
        "training": partial(measure_training, config.base_model, config.steps, config.batch_size, config.repeats),
        "generation": partial(measure_generation, config.base_model, config.repeats),
        "simulated": partial(measure_simulated_round, config.study, config.round_steps, folder / "demo"),
        "deployed": partial(deployed.run, folder, config.round_steps),
        "scale": partial(measure_scale, report=report),
        "wire": measure_wire,
        "nodes": partial(stub_nodes.run, folder, config.sites),
        "ray": partial(ray_cluster.run, folder),
        "demo": partial(_demo, Path(config.demo)),
    }


def _demo(folder: Path) -> dict[str, Any]:
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        return {key: summary[key] for key in DEMO_NUMBERS}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"'{folder}' holds no whole run of ld-simulate ({error}): run make demo, or set demo"
        ) from error
