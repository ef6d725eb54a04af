"""What `ld-evaluate-privacy` runs: the parts of the benchmark, each with a bar or a line."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_client.site_config import load_site
from ld_common.core.command import progress_bar
from ld_simulations.benchmarks.privacy.attacks import attack, patients_of_attacks
from ld_simulations.benchmarks.privacy.cost import step_ratio
from ld_simulations.benchmarks.privacy.kills import kill_rounds
from ld_simulations.benchmarks.privacy.norms import gradient_norms
from ld_simulations.benchmarks.privacy.plan import PrivacyBenchmark, load_privacy_benchmark
from ld_simulations.benchmarks.privacy.quality import QualityRuns
from ld_simulations.benchmarks.privacy.report import PrivacyResults, write_results
from ld_simulations.benchmarks.privacy.sums import measure_sum
from ld_simulations.benchmarks.workers import work_through
from ld_simulations.demo import load_demo, prepare_sites

PATIENTS_OF_KILLS = 4

console = Console()


def _cost(benchmark: PrivacyBenchmark, results: PrivacyResults, config: Path) -> None:
    if results.read("cost", "step") is None:
        with console.status("timing private and plain steps"):
            results.write("cost", "step", step_ratio(benchmark))


def _kills(benchmark: PrivacyBenchmark, results: PrivacyResults, config: Path) -> None:
    if results.read("kills", "kills") is not None:
        return
    output, patients = benchmark.output / "killed", f"hospital_overrides=[patients={PATIENTS_OF_KILLS},held_out=1]"
    demo = load_demo(config.parent / "demo.yaml", [f"output={output}", patients])
    prepare_sites(demo)
    site = load_site(sorted(demo.sites.glob("*.yaml"))[0])
    with console.status(f"killing {benchmark.config.kills} rounds"):
        results.write("kills", "kills", asdict(kill_rounds(site, benchmark.config.kills, 0)))


def _sums(benchmark: PrivacyBenchmark, results: PrivacyResults, config: Path) -> None:
    for sites in benchmark.config.sums:
        for length in benchmark.config.lengths:
            if results.read("sums", f"{sites}-{length}") is None:
                with console.status(f"secure sum of {length} numbers over {sites} sites"):
                    results.write("sums", f"{sites}-{length}", measure_sum(sites, length))


def _norms(benchmark: PrivacyBenchmark, results: PrivacyResults, config: Path) -> None:
    if results.read("norms", "norms") is None:
        with console.status("lengths of public patients' gradients"):
            results.write("norms", "norms", gradient_norms(QualityRuns(benchmark)))


def _attacks(benchmark: PrivacyBenchmark, results: PrivacyResults, config: Path) -> None:
    missing = [run for run in benchmark.attacked if results.read("attacks", run.name) is None]
    make = functools.partial(QualityRuns, benchmark)
    if missing:
        patients_of_attacks(make())
    with progress_bar(console, "attacks", len(missing), transient=False) as advance:
        for run, found in work_through(make, attack, missing, benchmark.config.workers):
            results.write("attacks", run.name, found)
            advance(1)


def _quality(benchmark: PrivacyBenchmark, results: PrivacyResults, config: Path) -> None:
    missing = [run for run in benchmark.trainings if results.read("quality", run.name) is None]
    make = functools.partial(QualityRuns, benchmark)
    if missing:
        with console.status("patients"):
            make().prepare()
    starts = list(dict.fromkeys((run.setting.rank, run.seed) for run in missing if run.setting.warm_start))
    with progress_bar(console, "public starts", len(starts), transient=False) as advance:
        for _ in work_through(make, QualityRuns.public_start, starts, benchmark.config.workers):
            advance(1)
    with progress_bar(console, "trainings", len(missing), transient=False) as advance:
        for run, found in work_through(make, QualityRuns.run, missing, benchmark.config.workers):
            results.write("quality", run.name, found)
            advance(1)


PARTS = {"cost": _cost, "kills": _kills, "sums": _sums, "norms": _norms, "attacks": _attacks, "quality": _quality}


def fill_tables(config: Path, overrides: list[str], only_report: bool) -> None:
    """Run what is not there yet of each part, unless `only_report`, and write the tables."""
    benchmark = load_privacy_benchmark(config, overrides)
    results = PrivacyResults(benchmark)
    if not only_report:
        for part in benchmark.config.parts:
            PARTS[part](benchmark, results, config)
    for file in write_results(benchmark):
        console.print(f"wrote {file}", soft_wrap=True)
