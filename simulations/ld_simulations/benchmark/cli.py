"""`ld-evaluate`: the table of latent drift, resumable, several trainings at a time; or a release's counterfactuals."""

from __future__ import annotations

import datetime
import functools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import typer
from rich.console import Console

import ld_common.offline  # noqa: F401  (before any model library)
from ld_common.command import progress_bar, run_cli
from ld_common.config import load_config, nearest, require
from ld_common.errors import RequestError
from ld_common.methods import METHODS
from ld_common.release import read_release
from ld_server.draw import make_folder
from ld_simulations.benchmark.execution import Worker
from ld_simulations.benchmark.plan import Benchmark, Training, load_benchmark
from ld_simulations.benchmark.report import write_results
from ld_simulations.counterfactuals.execution import judge_release
from ld_simulations.counterfactuals.judge import JudgeConfig
from ld_simulations.counterfactuals.table import write_release_table

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()

_own: list[Worker] = []
"""A pool's process has one worker for its life."""


@cli.command()
def evaluate(
    config: Path | None = typer.Option(None, help="YAML of the benchmark, for example configs/benchmark_ld.yaml."),
    only_report: bool = typer.Option(False, help="Train nothing: write the table of the results that there are."),
    release: Path | None = typer.Option(None, help="In place of --config: a release whose counterfactuals are judged."),
    data: Path | None = typer.Option(None, help="With --release: folder with scans.csv (patient, input, attributes)."),
    reference: Path | None = typer.Option(None, help="With --release: such a table of other patients, for judges."),
    method: list[str] = typer.Option([], help="With --release: a way of editing; repeatable. By default its own."),
    seeds: int = typer.Option(3, help="With --release: how often methods that draw noise are asked."),
    base: str | None = typer.Option(None, help="With --release: its base model, if not where it says."),
    out: Path = typer.Option(Path("evaluation"), help="With --release: folder for the table."),
    overrides: list[str] = typer.Argument(
        None, help="key=value: of the benchmark, seeds=[0] device=cuda workers=8; with --release cycles, cycled."
    ),
) -> None:
    """Judge a release's counterfactuals on scans, or (--config) fill the table of latent drift.

    The latter trains every scheme, draws with and without drift and under each control, measures, writes the table.
    """
    if release is not None and data is not None and config is None:
        _judge(release, data, reference, method, seeds, base, out, load_config(JudgeConfig, None, overrides or []))
        return
    if config is None or release is not None or data is not None:
        raise RequestError("give --config, or --release with --data")
    benchmark = load_benchmark(config, overrides or [])
    output = Path(benchmark.config.output)
    benchmark.claim_output()
    if not only_report:
        _fill(benchmark, output)
    for file in write_results(benchmark):
        console.print(f"wrote {file}", soft_wrap=True)


def _judge(
    release: Path,
    data: Path,
    reference: Path | None,
    methods: list[str],
    seeds: int,
    base: str | None,
    out: Path,
    config: JudgeConfig,
) -> None:
    """Ask a release in each way, with a bar, and write the table."""
    for name in methods:
        require(name in METHODS, f"--method {name}: {nearest(name, list(METHODS))}")
    require(seeds > 0, f"--seeds is {seeds}: it must be above 0")
    make_folder(out)
    asked = list(dict.fromkeys(methods)) or [read_release(release).study.edit.method]
    total = sum(seeds if METHODS[name]().uses_noise else 1 for name in asked)
    with progress_bar(console, "judging", total) as advance:
        runs = judge_release(release, data, reference, asked, seeds, config, base, lambda: advance(1))
    for file in write_release_table(out, runs, read_release(release).study.name, data):
        console.print(f"wrote {file}", soft_wrap=True)


def _fill(benchmark: Benchmark, output: Path) -> None:
    """Run whatever is not there yet."""
    with progress_bar(console, "real pictures", len(benchmark.modalities), transient=False) as advance:
        worker = Worker(benchmark)
        for modality in benchmark.modalities:
            worker.prepare(modality)
            advance(1)
    tasks = benchmark.trainings
    with progress_bar(console, "trainings and samples", len(tasks), transient=False) as advance:
        for training in _run(benchmark, tasks):
            advance(1)
            with (output / "log.txt").open("a") as log:
                print(f"{datetime.datetime.now():%F %T} {training.name}", file=log)


def _run(benchmark: Benchmark, tasks: list[Training]) -> Iterator[Training]:
    """Run all trainings; yields each as it ends."""
    workers = benchmark.config.workers
    if workers == 1:
        worker = Worker(benchmark)
        for task in tasks:
            worker.run(task)
            yield task
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, functools.partial(_start, benchmark, threads)) as pool:
        futures = {pool.submit(_train, task): task for task in tasks}
        for future in as_completed(futures):
            future.result()
            yield futures[future]


def _start(benchmark: Benchmark, threads: int) -> None:
    _own.append(Worker(benchmark, threads))


def _train(task: Training) -> list[Path]:
    return _own[0].run(task)


def main() -> None:
    """Entry point of `ld-evaluate`."""
    run_cli(cli)


if __name__ == "__main__":
    main()
