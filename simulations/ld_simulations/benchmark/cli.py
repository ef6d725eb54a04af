"""`ld-evaluate`: fill the table of latent drift, resumable, several trainings at a time."""

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
from ld_simulations.benchmark.execution import Worker
from ld_simulations.benchmark.plan import Benchmark, Training, load_benchmark
from ld_simulations.benchmark.report import write_results

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()

_own: list[Worker] = []
"""A pool's process has one worker for its life."""


@cli.command()
def evaluate(
    config: Path = typer.Option(..., help="YAML of the benchmark, for example configs/benchmark_ld.yaml."),
    only_report: bool = typer.Option(False, help="Train nothing: write the table of the results that there are."),
    overrides: list[str] = typer.Argument(None, help="key=value, for example seeds=[0] device=cuda workers=8."),
) -> None:
    """Train every scheme, draw with and without drift and under each control, measure, write the table."""
    benchmark = load_benchmark(config, overrides or [])
    output = Path(benchmark.config.output)
    benchmark.claim_output()
    if not only_report:
        _fill(benchmark, output)
    for file in write_results(benchmark):
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
