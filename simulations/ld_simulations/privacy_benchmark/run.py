"""What `ld-evaluate-privacy` runs: the parts of the benchmark, each with a bar or a line."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

import ld_common.offline  # noqa: F401  (before any model library)
from ld_client.site import load_site
from ld_common.command import progress_bar
from ld_simulations.demo import load_demo, prepare_sites
from ld_simulations.privacy_benchmark.attacks import attack
from ld_simulations.privacy_benchmark.cost import step_ratio
from ld_simulations.privacy_benchmark.kills import kill_rounds
from ld_simulations.privacy_benchmark.plan import PrivacyBenchmark, load_privacy_benchmark
from ld_simulations.privacy_benchmark.quality import QualityRuns
from ld_simulations.privacy_benchmark.report import Results, write_results
from ld_simulations.privacy_benchmark.sums import measure_sum

PATIENTS_OF_KILLS = 4
ATTACKED_EPSILON = 8.0

console = Console()


def _cost(benchmark: PrivacyBenchmark, results: Results, runs: QualityRuns, config: Path) -> None:
    if results.read("cost", "step") is None:
        with console.status("timing private and plain steps"):
            results.write("cost", "step", step_ratio(benchmark))


def _kills(benchmark: PrivacyBenchmark, results: Results, runs: QualityRuns, config: Path) -> None:
    if results.read("kills", "kills") is not None:
        return
    output, patients = benchmark.output / "killed", f"hospital_overrides=[patients={PATIENTS_OF_KILLS},held_out=1]"
    demo = load_demo(config.parent / "demo.yaml", [f"output={output}", patients])
    prepare_sites(demo)
    site = load_site(sorted(demo.sites.glob("*.yaml"))[0])
    with console.status(f"killing {benchmark.config.kills} rounds"):
        results.write("kills", "kills", asdict(kill_rounds(site, benchmark.config.kills, 0)))


def _sums(benchmark: PrivacyBenchmark, results: Results, runs: QualityRuns, config: Path) -> None:
    for sites in benchmark.config.sums:
        for length in benchmark.config.lengths:
            if results.read("sums", f"{sites}-{length}") is None:
                with console.status(f"secure sum of {length} numbers over {sites} sites"):
                    results.write("sums", f"{sites}-{length}", measure_sum(sites, length))


def _attacks(benchmark: PrivacyBenchmark, results: Results, runs: QualityRuns, config: Path) -> None:
    for seed in benchmark.config.seeds:
        for name, epsilon in (("overfitted", 0.0), ("private", ATTACKED_EPSILON)):
            if results.read("attacks", f"{name}-{seed}") is None:
                with console.status(f"attacking a run: {name}, seed {seed}"):
                    found = attack(benchmark, runs, epsilon, seed, lambda *_: None)
                results.write("attacks", f"{name}-{seed}", found)


def _quality(benchmark: PrivacyBenchmark, results: Results, runs: QualityRuns, config: Path) -> None:
    wanted = {
        f"{setting.name}-{seed}": (setting, seed)
        for seed in benchmark.config.seeds
        for _, _, setting in benchmark.tables()
    }
    with progress_bar(console, "trainings", len(wanted), transient=False) as advance:
        for name, (setting, seed) in wanted.items():
            if results.read("quality", name) is None:
                found = {"setting": asdict(setting), "seed": seed, **runs.run(setting, seed)}
                results.write("quality", name, found)
            advance(1)


PARTS = {"cost": _cost, "kills": _kills, "sums": _sums, "attacks": _attacks, "quality": _quality}


def fill_tables(config: Path, overrides: list[str], only_report: bool) -> None:
    """Run what is not there yet of each part, unless `only_report`, and write the tables."""
    benchmark = load_privacy_benchmark(config, overrides)
    results, runs = Results(benchmark), QualityRuns(benchmark, os.cpu_count() or 1)
    if not only_report:
        for part in benchmark.config.parts:
            PARTS[part](benchmark, results, runs, config)
    for file in write_results(benchmark):
        console.print(f"wrote {file}", soft_wrap=True)
