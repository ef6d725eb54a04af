"""`ld-benchmark latent-drift`: train and draw what is not there yet, and write the page."""

from __future__ import annotations

import functools
from pathlib import Path

from rich.console import Console

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.core.command import progress_bar
from ld_common.diffusion.base_model import base_digest
from ld_simulations.benchmarks.harness import Harness, ResultStore, claim_plan
from ld_simulations.benchmarks.latent_drift.plan import STRIP, Benchmark, adopted_results
from ld_simulations.benchmarks.latent_drift.report import write_results
from ld_simulations.benchmarks.latent_drift.worker import DriftWorker


def run(benchmark: Benchmark, only_report: bool, console: Console) -> list[Path]:
    """Run what has no result yet, unless `only_report`, and write the page; returns the files.

    Raises:
        ConfigError: the output folder holds results of another plan.
    """
    output = Path(benchmark.config.output)
    store = ResultStore(output, adopted_results(benchmark))
    if not only_report:
        bases = [name for name in (benchmark.config.base_model, benchmark.config.zero_snr_base) if name]
        claim_plan(output, benchmark.plan() | {"base_digests": [base_digest(name) for name in bases]})
        _fill(benchmark, Harness(store, console, benchmark.config.workers))
    return write_results(benchmark, store)


def _fill(benchmark: Benchmark, harness: Harness) -> None:
    missing = [
        training
        for training in benchmark.trainings
        if any(harness.store.read(drawing.name) is None for drawing in benchmark.drawings(training))
    ]
    make = functools.partial(DriftWorker, benchmark)
    with progress_bar(harness.console, "real images", len(benchmark.modalities), transient=False) as advance:
        worker = make()
        for modality in benchmark.modalities:
            # what several processes would otherwise do twice
            if any(training.modality == modality for training in missing):
                worker.prepare(modality)
            harness.once(f"reference-{modality}", functools.partial(worker.reference, modality))
            advance(1)
    harness.run("trainings and samples", missing, make, DriftWorker.run, done=lambda training: False)
    if benchmark.config.strip.modality:
        harness.once(STRIP, lambda: make().strip())
