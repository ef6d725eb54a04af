"""What `ld-evaluate` runs, with bars: trainings in several processes, then a table; or a judgement of a release."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.core.command import progress_bar
from ld_common.core.config import load_config, require
from ld_common.editing.registry import EDITORS
from ld_common.release.release import read_release, release_editor
from ld_generate.samples import make_folder
from ld_simulations.benchmarks.counterfactuals.execution import judge_release
from ld_simulations.benchmarks.counterfactuals.judge import JudgeConfig
from ld_simulations.benchmarks.counterfactuals.table import write_release_table
from ld_simulations.benchmarks.latent_drift.execution import DriftWorker
from ld_simulations.benchmarks.latent_drift.plan import Benchmark, load_benchmark
from ld_simulations.benchmarks.latent_drift.report import write_results
from ld_simulations.benchmarks.workers import work_through

console = Console()


def fill_table(config: Path, overrides: list[str], only_report: bool) -> None:
    """Train and draw what is not there yet of the benchmark, unless `only_report`, and write its table."""
    benchmark = load_benchmark(config, overrides)
    output = Path(benchmark.config.output)
    benchmark.claim_output()
    if not only_report:
        _fill(benchmark, output)
    for file in write_results(benchmark):
        console.print(f"wrote {file}", soft_wrap=True)


def judge(
    release: Path,
    data: Path,
    reference: Path | None,
    editors: Sequence[str],
    seeds: int,
    base: str | None,
    out: Path,
    overrides: list[str],
) -> None:
    """Ask a release in each way, with a bar, and write the table."""
    config = load_config(JudgeConfig, None, overrides)
    drawing = {name: EDITORS.load(name).draws_noise() for name in editors}
    require(seeds > 0, f"--seeds is {seeds}: it must be above 0")
    make_folder(out)
    asked = list(drawing) or [release_editor(read_release(release)).name]
    total = sum(seeds if EDITORS.load(name).draws_noise() else 1 for name in asked)
    with progress_bar(console, "judging", total) as advance:
        runs = judge_release(release, data, reference, asked, seeds, config, base, lambda: advance(1))
    for file in write_release_table(out, runs, read_release(release).study.name, data):
        console.print(f"wrote {file}", soft_wrap=True)


def _fill(benchmark: Benchmark, output: Path) -> None:
    """Run whatever is not there yet."""
    with progress_bar(console, "real pictures", len(benchmark.modalities), transient=False) as advance:
        worker = DriftWorker(benchmark)
        for modality in benchmark.modalities:
            worker.prepare(modality)
            advance(1)
    tasks, make = benchmark.trainings, functools.partial(DriftWorker, benchmark)
    with progress_bar(console, "trainings and samples", len(tasks), transient=False) as advance:
        for training, _ in work_through(make, DriftWorker.run, tasks, benchmark.config.workers):
            advance(1)
            with (output / "log.txt").open("a") as log:
                print(f"{datetime.datetime.now():%F %T} {training.name}", file=log)
