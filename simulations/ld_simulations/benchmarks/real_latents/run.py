"""`ld-benchmark real-latents`: latent drift of real scans in FLUX.2's latent space, and what it does for samples."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ld_common.core.atomic_files import write_bytes
from ld_common.core.command import progress_bar
from ld_common.core.config import to_mapping
from ld_common.core.errors import ConfigError
from ld_simulations.benchmarks.harness import (
    PART_RESULTS,
    Harness,
    ResultStore,
    adopted_parts,
    claim_plan,
    json_bytes,
    this_machine,
)
from ld_simulations.benchmarks.real_latents.figures import channel_figure, sample_figure
from ld_simulations.benchmarks.real_latents.plan import RealLatentsBenchmark
from ld_simulations.benchmarks.real_latents.report import flat_numbers, page_lines
from ld_simulations.benchmarks.real_latents.study import RealLatentsStudy

NUMBERS, PAGE = "real_latents.json", "real_latents.md"
CHANNELS, SAMPLES = "real_latents_channels.png", "real_latents_samples.png"
ANYWHERE = ("output", "results", "adopt", "data", "seeds")
"""Keys that decide no result, or only which there are."""
PARTS = ("reconstruction", "drift", "sites", "base", "references")


def run(benchmark: RealLatentsBenchmark, only_report: bool, console: Console) -> list[Path]:
    """Do what has no result yet, and write the page; returns its files, none where the data are absent."""
    config = benchmark.config
    store = ResultStore(benchmark.output, adopted_parts(config.adopt, "real-latents"))
    missing = benchmark.missing()
    study = None if missing is not None else RealLatentsStudy(benchmark)
    names = [*PARTS, *(_seed(seed) for seed in config.seeds)]
    if not only_report and len(store.collect(names)) < len(names):
        if study is None:
            console.print(f"skipped: there is no '{missing}'; give data=FOLDER with the images", soft_wrap=True)
            return []
        claim_plan(benchmark.output, {key: value for key, value in to_mapping(config).items() if key not in ANYWHERE})
        harness = Harness(store, console)
        for name in PARTS:
            compute = partial(_base, study, config.base_steps, console) if name == "base" else getattr(study, name)
            harness.once(name, partial(_timed, compute))
        for seed in config.seeds:
            harness.once(_seed(seed), partial(_timed, partial(study.drawn, seed)))
    return _write(benchmark, store, study)


def _seed(seed: int) -> str:
    return f"seed-{seed}"


def _base(study: RealLatentsStudy, steps: int, console: Console) -> dict[str, Any]:
    with progress_bar(console, "training the base", steps, transient=False) as advance:
        return study.base(advance)


def _timed(compute: Any) -> dict[str, Any]:
    started = time.monotonic()
    result = compute()
    return {**result, "seconds": round(time.monotonic() - started, 1), "machine": this_machine()}


def _write(benchmark: RealLatentsBenchmark, store: ResultStore, study: RealLatentsStudy | None) -> list[Path]:
    """The page, the numbers, and the figures for which everything is there."""
    config, folder = benchmark.config, Path(benchmark.config.results)
    parts = store.collect([*PARTS, *(_seed(seed) for seed in config.seeds)])
    absent = [name for name in (*PARTS, _seed(config.seeds[0])) if name not in parts]
    if absent:
        raise ConfigError(f"'{benchmark.output}' holds no result of {', '.join(absent)}: leave --only-report out")
    files = {folder / NUMBERS: json_bytes(flat_numbers(parts) | {PART_RESULTS: parts})}
    files[folder / PAGE] = "\n".join(page_lines(config, parts)).encode()
    files[folder / CHANNELS] = channel_figure(parts["drift"]["drifts"], parts["drift"]["chance"])
    sheet = None if study is None else sample_figure(study.figure_folder, study.means_of_scans())
    if sheet is not None:
        files[folder / SAMPLES] = sheet
    for file, content in files.items():
        write_bytes(file, content)
    return list(files)
