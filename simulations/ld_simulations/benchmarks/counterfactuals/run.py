"""`ld-benchmark counterfactuals`: train every release, judge every editor, write the page."""

from __future__ import annotations

import functools
from pathlib import Path

from rich.console import Console

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.core.errors import RequestError
from ld_evaluate.patient_tables import Run
from ld_simulations.benchmarks.counterfactuals.plan import CounterfactualsBenchmark
from ld_simulations.benchmarks.counterfactuals.table import best_editor, write_table
from ld_simulations.benchmarks.counterfactuals.worker import ReleaseWorker, adopted_results, speedup_name
from ld_simulations.benchmarks.harness import Harness, ResultStore
from ld_simulations.preparation import prepare_sites
from ld_simulations.summary import edit_ceilings


def run(benchmark: CounterfactualsBenchmark, only_report: bool, console: Console) -> list[Path]:
    """Judge what has no result yet, unless `only_report`, and write the page; returns the files.

    Raises:
        RequestError: there is no result at all.
    """
    store = ResultStore(benchmark.output, adopted_results(benchmark))
    harness = Harness(store, console, benchmark.config.workers)
    if not only_report:
        _judge(benchmark, harness)
    tasks = benchmark.tasks
    results = list(store.collect(task.name for task in tasks).values())
    if not results:
        raise RequestError(f"'{benchmark.output}' holds no result yet: leave --only-report out, or set adopt")
    speedup = _batch_speedup(benchmark, harness, results, only_report)
    ceilings = {name: edit_ceilings(benchmark.demo(name).hospitals) for name in benchmark.config.demos}
    return write_table(Path(benchmark.config.results), results, len(tasks), ceilings, speedup)


def _judge(benchmark: CounterfactualsBenchmark, harness: Harness) -> None:
    make, worker = functools.partial(ReleaseWorker, benchmark), ReleaseWorker(benchmark)
    missing = [task for task in benchmark.tasks if harness.store.read(task.name) is None]
    for modality in dict.fromkeys(task.training.modality for task in missing):
        with harness.console.status(f"hospitals of the {modality}"):
            prepare_sites(benchmark.demo(modality))
    for seed in benchmark.config.seeds:
        tasks = [task for task in missing if task.training.seed == seed]
        trainings = list(dict.fromkeys(task.training for task in tasks))
        harness.run(f"seed {seed}: trainings", trainings, make, ReleaseWorker.train, worker.is_trained)
        harness.run(f"seed {seed}: judgements", tasks, make, ReleaseWorker.judge)


def _batch_speedup(
    benchmark: CounterfactualsBenchmark, harness: Harness, results: list[Run], only_report: bool
) -> Run | None:
    """The timing of the best editor's batch; None where it has not been timed and nothing may run."""
    modality, editor = best_editor(results)
    name = speedup_name(modality, editor)
    if only_report:
        return harness.store.read(name)
    tasks = [task for task in benchmark.tasks if (task.training.modality, task.editor) == (modality, editor)]
    return harness.once(name, lambda: ReleaseWorker(benchmark).batch_speedup(tasks[0]))
