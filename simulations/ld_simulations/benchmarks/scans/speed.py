"""Times reading and indexing against a bare loop of pydicom, and an index against the one before it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ld_common.core.errors import DeploymentError
from ld_simulations.benchmarks.scans.plan import ScansConfig
from ld_simulations.benchmarks.scans.timed import BARE, BUILD, READ, run_timed
from ld_simulations.benchmarks.scans.trees import ImageWriter, TreeSize, TreeVisit, visits_of, write_tree, write_visits

NO_SEARCH = "data.burned_in_text_checked=['*']"
SETTLE_SECONDS = 3.0
"""After writing: an index remembers nothing of files that were written just before it began."""
Report = Callable[[str], None]


def time_reading(config: ScansConfig, folder: Path, report: Report = lambda _: None) -> dict[str, Any]:
    """Interleaved runs of the bare loop, of reading, and of reading a part of the tree with the search for text.

    Returns:
        files, visits and repeats, seconds of each run, and the medians of the ratios of neighbouring runs.
    """
    size = TreeSize(config.read_patients, slices=config.slices)
    few = TreeSize(config.searched_patients, slices=config.slices)
    whole = _written(config, folder / "whole", size)
    part = _written(config, folder / "part", few)
    runs: dict[str, list[float]] = {"bare": [], "reading": [], "bare_of_part": [], "with_search": []}

    def run(key: str, what: str, site: Path, wanted: int, *overrides: str) -> None:
        store = folder / f"store-{key}-{len(runs[key])}"  # an earlier run's store must not help
        done = run_timed(what, site, [f"store={store}", *overrides])
        if done["files" if what == BARE else "visits"] != wanted:
            raise DeploymentError(f"'{key}' read {done}, not {wanted}: this benchmark's own tree is at fault")
        runs[key].append(round(done["seconds"], 3))
        report(f"{key}: {done['seconds']:.2f} s")

    for _ in range(config.repeats):
        run("bare", BARE, whole, size.files)
        run("reading", READ, whole, size.patients * size.visits, NO_SEARCH)
    for _ in range(config.search_repeats):
        run("bare_of_part", BARE, part, few.files)
        run("with_search", READ, part, few.patients * few.visits)
    return {
        "files": size.files,
        "visits": size.patients * size.visits,
        "files_of_part": few.files,
        "visits_of_part": few.patients * few.visits,
        "repeats": config.repeats,
        "search_repeats": config.search_repeats,
        "seconds": runs,
        "reading_over_bare": median_ratio(runs["reading"], runs["bare"]),
        "with_search_over_bare": median_ratio(runs["with_search"], runs["bare_of_part"]),
    }


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios of runs that followed one another."""
    return round(statistics.median(a / b for a, b in zip(numerators, denominators, strict=True)), 3)


def time_reindex(config: ScansConfig, folder: Path, report: Report = lambda _: None) -> dict[str, Any]:
    """Index a tree, index it again unchanged, and once more with one visit more, each time in a new process.

    Returns:
        files and visits, seconds of each run, and the shares of the first run's seconds that the others took.
    """
    size = TreeSize(config.indexed_patients, slices=config.slices)
    site = _written(config, folder, size)
    time.sleep(SETTLE_SECONDS)
    visits = list(visits_of(size))
    first = _built(site, len(visits), "first index", report)
    again = [_built(site, len(visits), "again, unchanged", report) for _ in range(config.reindex_repeats)]
    visits.append(TreeVisit(0, size.visits))
    ImageWriter(seed=1).write_series(folder / "scans", visits[-1], size.slices)
    write_visits(folder, visits)
    time.sleep(SETTLE_SECONDS)
    one_new = _built(site, len(visits), "with one visit more", report)
    seconds = [round(statistics.median(run[key] for run in again), 3) for key in ("seconds", "process_seconds")]
    return {
        "files": size.files,
        "visits": size.patients * size.visits,
        "repeats": config.reindex_repeats,
        "index_seconds": round(first["seconds"], 3),
        "index_command_seconds": round(first["process_seconds"], 3),
        "reindex_seconds": seconds[0],
        "reindex_command_seconds": seconds[1],
        "reindex_one_new_seconds": round(one_new["seconds"], 3),
        "reindex_over_index": round(seconds[0] / first["seconds"], 4),
        "reindex_one_new_over_index": round(one_new["seconds"] / first["seconds"], 4),
    }


def _built(site: Path, visits: int, name: str, report: Report) -> dict[str, Any]:
    done = run_timed(BUILD, site)
    if done["visits"] != visits:
        raise DeploymentError(f"'{name}' has {done['visits']} visits, not {visits}")
    report(f"{name}: {done['seconds']:.2f} s")
    return done


def _written(config: ScansConfig, folder: Path, size: TreeSize) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write_tree(folder, size, Path(config.project), Path(config.base_model), config.seed)
