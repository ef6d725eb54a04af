"""The table of counterfactuals, resumable, several at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.core.command import progress_bar, run_cli
from ld_common.core.errors import RequestError
from ld_simulations.benchmarks.counterfactuals.execution import ReleaseWorker
from ld_simulations.benchmarks.counterfactuals.plan import CounterfactualsBenchmark, load_counterfactuals
from ld_simulations.benchmarks.counterfactuals.table import best_editor, write_table
from ld_simulations.benchmarks.workers import work_through
from ld_simulations.demo import prepare_sites
from ld_simulations.hospitals import held_out_population
from ld_simulations.phantoms.growth_ceiling import growth_ceiling
from ld_simulations.phantoms.registry import find_phantom

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()


@cli.command()
def evaluate(
    config: Path = typer.Option(..., help="YAML of the table, for example configs/benchmark_counterfactuals.yaml."),
    only_report: bool = typer.Option(
        False, help="CounterfactualJudge nothing: write the table of what there is, once its best batch is timed."
    ),
    overrides: list[str] = typer.Argument(None, help="key=value, for example seeds=[0] workers=1."),
) -> None:
    """Train every release, ask it in every way, measure, write the table."""
    benchmark = load_counterfactuals(config, overrides or [])
    ceilings = {}
    for modality in benchmark.config.demos:
        demo = benchmark.demo(modality)
        prepare_sites(demo)
        populations = [held_out_population(hospital.population) for hospital in demo.hospitals.hospitals]
        ceilings[modality] = growth_ceiling(populations, phantom=find_phantom(demo.hospitals.phantom)).overall
    askings, worker = list(benchmark.askings), ReleaseWorker(benchmark)
    for seed in [] if only_report else benchmark.config.seeds:
        own = [asking for asking in askings if asking.training.seed == seed and worker.found(asking) is None]
        _run(
            benchmark,
            f"seed {seed}: trainings",
            ReleaseWorker.train,
            list(dict.fromkeys(asking.training for asking in own)),
        )
        _run(benchmark, f"seed {seed}: judgements", ReleaseWorker.ask, own)
    runs = [found for asking in askings if (found := worker.found(asking)) is not None]
    if not runs:
        raise RequestError(f"'{benchmark.output}' holds no result yet: leave --only-report out")
    best = best_editor(runs)
    speedup = worker.batch_speedup(next(one for one in askings if (one.training.modality, one.editor) == best))
    page = write_table(Path(benchmark.config.results), runs, len(askings), ceilings, speedup)
    console.print(f"wrote {page}", soft_wrap=True)


def _run(benchmark: CounterfactualsBenchmark, title: str, work: Callable[..., Any], tasks: Sequence[Any]) -> None:
    """Do `work` of a worker for each task, with a bar."""
    make = functools.partial(ReleaseWorker, benchmark)
    with progress_bar(console, title, len(tasks), transient=False) as advance:
        for _ in work_through(make, work, tasks, benchmark.config.workers):
            advance(1)


def main() -> None:
    """Entry point."""
    run_cli(cli)


if __name__ == "__main__":
    main()
