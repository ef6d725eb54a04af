"""`ld-benchmark scans`: do each part that has no result yet, and write the page and the page of formats."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.core.config import to_mapping
from ld_simulations.benchmarks.harness import Harness, ResultStore, adopted_parts, claim_plan, this_machine
from ld_simulations.benchmarks.scans.cases import judge_cases
from ld_simulations.benchmarks.scans.formats import try_formats
from ld_simulations.benchmarks.scans.layouts import TRIALS, try_layout
from ld_simulations.benchmarks.scans.memory import watch_index
from ld_simulations.benchmarks.scans.pacs import try_pacs
from ld_simulations.benchmarks.scans.plan import ScansConfig
from ld_simulations.benchmarks.scans.report import write_report
from ld_simulations.benchmarks.scans.speed import time_reading, time_reindex

NOT_DECIDING = ("output", "results", "reference", "adopt", "parts", "project", "cases", "base_model")


def run(config: ScansConfig, only_report: bool, console: Console) -> list[Path]:
    """Do the parts that have no result yet, unless `only_report`, and write the pages; returns the files.

    A part whose data or server is absent has no result: it is named in a line and tried again by the next run.
    """
    output = Path(config.output).resolve()
    store = ResultStore(output, adopted_parts(config.adopt, "scans"))
    if not only_report:
        plan: dict[str, Any] = to_mapping(config)
        claim_plan(output, {key: value for key, value in plan.items() if key not in NOT_DECIDING})
        harness = Harness(store, console)
        for part in config.parts:
            console.print(f"[bold]{part}")
            _do(part, config, harness)
    return write_report(store, Path(config.results), Path(config.reference))


def _do(part: str, config: ScansConfig, harness: Harness) -> None:
    cases = Path(config.cases)
    report = partial(harness.console.print, soft_wrap=True, highlight=False, markup=False)
    if part == "cases" and not cases.is_dir():
        report(f"skipped: there is no '{config.cases}'; give cases=FOLDER")
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        work: dict[str, Callable[[], Any]] = {
            "cases": partial(judge_cases, cases, Path(config.project)),
            "formats": partial(try_formats, Path(config.project)),
            "layouts": partial(_layouts, config, folder),
            "reading": lambda: time_reading(config, folder, report) | this_machine(),
            "reindex": lambda: time_reindex(config, folder, report) | this_machine(),
            "memory": lambda: watch_index(config, folder, report) | this_machine(),
        }
        if part != "pacs":
            harness.once(part, work[part])
        elif harness.store.read(part) is None:
            result = try_pacs(config, folder)
            if result is None:
                report("skipped: no Orthanc on this machine; install orthanc and orthanc-dicomweb")
            else:
                harness.store.write(part, result)


def _layouts(config: ScansConfig, folder: Path) -> dict[str, Any]:
    results = {}
    for number, trial in enumerate(TRIALS):
        place = folder / str(number)
        place.mkdir()
        results[trial.name] = try_layout(trial, place, Path(config.project), Path(config.base_model))
    return results
