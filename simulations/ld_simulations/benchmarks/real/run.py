"""`ld-benchmark real`: follow-ups of real patients, each answered by what other patients show."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import load_base
from ld_common.imaging.modality import Modality
from ld_simulations.benchmarks.harness import Harness, ResultStore, json_bytes
from ld_simulations.benchmarks.real.brains import judge_brains
from ld_simulations.benchmarks.real.meshnet import MeshNet
from ld_simulations.benchmarks.real.plan import RADIOGRAPHS, VOLUMES, WEIGHTS, RealBenchmark
from ld_simulations.benchmarks.real.radiographs import judge, read_visits
from ld_simulations.benchmarks.real.report import RADIOGRAPHS_SEEN, SOURCES, brain_lines, lines_of, numbers_of

NUMBERS, PAGE = "real_scans.json", "real_scans.md"
DAYS, CRP, BRAINS = "radiographs/days", "radiographs/days_and_crp", "brains"
SECTIONS = {
    DAYS: (
        "Chest radiographs, by days",
        "From a visit to the patient's next one; what is told is the days between, the sex and the projection of both.",
    ),
    CRP: (
        "Chest radiographs, by days and CRP",
        "The same of the visits at which C-reactive protein was measured, which is told of both visits: an answer may "
        "use that the patient got worse or better.",
    ),
}


def run(benchmark: RealBenchmark, only_report: bool, console: Console) -> list[Path]:
    """Do what has no result yet, and write the page; returns its files, none where the data are absent."""
    store = ResultStore(benchmark.output)
    if not only_report:
        if not benchmark.data.is_dir():
            console.print(f"skipped: there is no '{benchmark.data}'; give data=FOLDER with the images", soft_wrap=True)
            return []
        harness = Harness(store, console)
        harness.once(DAYS, partial(_radiographs, benchmark, benchmark.radiographs))
        harness.once(CRP, partial(_radiographs, benchmark, benchmark.with_crp))
        harness.once(BRAINS, partial(_brains, benchmark))
    return _write(benchmark, store)


def _radiographs(benchmark: RealBenchmark, modality: Modality) -> dict[str, list[dict[str, Any]]]:
    base = load_base(benchmark.config.base_model)
    visits = read_visits(benchmark.data / RADIOGRAPHS, modality, base.resolution)
    return judge(base, modality, visits, benchmark.output / f"{modality.name}.png")


def _brains(benchmark: RealBenchmark) -> list[dict[str, Any]]:
    base, network = load_base(benchmark.config.base_model), MeshNet(benchmark.data / WEIGHTS)
    return judge_brains(benchmark.data / VOLUMES, network, benchmark.brain, base, benchmark.output)


def _write(benchmark: RealBenchmark, store: ResultStore) -> list[Path]:
    folder = Path(benchmark.config.results)
    results = store.collect([DAYS, CRP, BRAINS])
    if not results:
        raise ConfigError(f"'{benchmark.output}' holds no result yet: leave --only-report out")
    lines = [
        "# Real scans",
        "",
        "Written by `make benchmark-real`, which reads images that are not part of this project. Nothing was chosen on "
        "them: editor drift has its own default options, the ridges have none. Each patient is answered by what the "
        "patients of the other four folds show. Pictures of patients are not published.",
        "",
        f"{SOURCES} The base is this project's small one, which never saw a real radiograph.",
        "",
    ]
    numbers: dict[str, Any] = {
        "real_followups_tested": sum(len(results[key]["copy"]) for key in (DAYS,) if key in results)
    }
    for key, (title, text) in SECTIONS.items():
        if key in results:
            numbers[key] = numbers_of(results[key])
            lines += [*lines_of(title, text, results[key]), *([RADIOGRAPHS_SEEN, ""] if key == DAYS else [])]
    if BRAINS in results:
        numbers[BRAINS] = results[BRAINS]
        lines += brain_lines(results[BRAINS])
    write_bytes(folder / NUMBERS, json_bytes(numbers))
    write_bytes(folder / PAGE, "\n".join(lines).encode())
    return [folder / NUMBERS, folder / PAGE]
