"""`ld-benchmark privacy`: run the parts that the config names, and write the page."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_client.site_config import load_site
from ld_simulations.benchmarks.harness import Harness, ResultStore
from ld_simulations.benchmarks.privacy.attacks import attack, patients_of_attacks
from ld_simulations.benchmarks.privacy.cost import step_ratio
from ld_simulations.benchmarks.privacy.kills import kill_rounds
from ld_simulations.benchmarks.privacy.norms import gradient_norms
from ld_simulations.benchmarks.privacy.plan import PrivacyBenchmark, PrivacyTraining, adopted_results, result_name
from ld_simulations.benchmarks.privacy.quality import QualityRuns
from ld_simulations.benchmarks.privacy.reconstruction import ReconstructionRuns
from ld_simulations.benchmarks.privacy.reconstruction_plan import Request, confirmed_name, requests
from ld_simulations.benchmarks.privacy.reconstruction_table import best_request
from ld_simulations.benchmarks.privacy.report import PrivacyResults, write_results
from ld_simulations.benchmarks.privacy.sums import measure_sum
from ld_simulations.demo import load_demo
from ld_simulations.preparation import prepare_sites

PATIENTS_OF_KILLS = 4


@dataclass(frozen=True)
class PartTask:
    """A training as a task of one part."""

    part: str
    training: PrivacyTraining

    @property
    def name(self) -> str:
        """Name of its result."""
        return result_name(self.part, self.training.name)


@dataclass(frozen=True)
class RequestTask:
    """A request of a malicious server."""

    request: Request

    @property
    def name(self) -> str:
        """Name of its result."""
        return result_name("reconstruction", self.request.name)


@dataclass(frozen=True)
class ConfirmationTask:
    """Fresh rounds of a request."""

    request: Request

    @property
    def name(self) -> str:
        """Name of its result."""
        return result_name("reconstruction", confirmed_name(self.request))


@dataclass(frozen=True)
class StartTask:
    """A public start that trainings of a rank and seed share."""

    rank: int
    seed: int
    start: str = ""
    """Name of another anatomy."""

    @property
    def name(self) -> str:
        """Name in the log."""
        return f"{self.start} rank {self.rank}, seed {self.seed}".strip()


def run(benchmark: PrivacyBenchmark, only_report: bool, console: Console) -> list[Path]:
    """Run what has no result yet of each part, unless `only_report`, and write the page; returns the files."""
    harness = Harness(ResultStore(benchmark.output, adopted_results(benchmark)), console, benchmark.config.workers)
    if not only_report:
        for part in benchmark.config.parts:
            PARTS[part](benchmark, harness)
    return write_results(benchmark, harness.store)


def _cost(benchmark: PrivacyBenchmark, harness: Harness) -> None:
    harness.once(result_name("cost", "step"), functools.partial(step_ratio, benchmark))


def _kills(benchmark: PrivacyBenchmark, harness: Harness) -> None:
    def kill() -> dict[str, int]:
        overrides = [f"output={benchmark.output / 'killed'}", f"patients={PATIENTS_OF_KILLS}", "test_patients=1"]
        demo = load_demo(benchmark.folder / "demo.yaml", overrides)
        prepare_sites(demo)
        site = load_site(sorted(demo.sites.glob("*.yaml"))[0])
        return asdict(kill_rounds(site, benchmark.config.kills, 0))

    harness.once(result_name("kills", "kills"), kill)


def _sums(benchmark: PrivacyBenchmark, harness: Harness) -> None:
    for sites in benchmark.config.sums:
        for length in benchmark.config.lengths:
            name = result_name("sums", f"{sites}-{length}")
            harness.once(name, functools.partial(measure_sum, sites, length))


def _norms(benchmark: PrivacyBenchmark, harness: Harness) -> None:
    harness.once(result_name("norms", "norms"), lambda: gradient_norms(QualityRuns(benchmark)))


def _attacks(benchmark: PrivacyBenchmark, harness: Harness) -> None:
    tasks = [PartTask("attacks", training) for training in benchmark.attacked]
    if any(harness.store.read(task.name) is None for task in tasks):
        with harness.console.status("patients of the attacks"):
            patients_of_attacks(QualityRuns(benchmark))
    harness.run("attacks", tasks, functools.partial(QualityRuns, benchmark), _attack)


def _attack(runs: QualityRuns, task: PartTask) -> dict[str, object]:
    return attack(runs, task.training)


def _reconstruction(benchmark: PrivacyBenchmark, harness: Harness) -> None:
    tasks = [RequestTask(request) for request in requests(benchmark.config.reconstruction)]
    make = functools.partial(_reconstruction_runs, benchmark)
    if any(harness.store.read(task.name) is None for task in tasks):
        with harness.console.status("patients of the reconstructions"):
            make()
    harness.run("reconstruction", tasks, make, _reconstruct)
    best = best_request(PrivacyResults(benchmark, harness.store).reconstructions())
    if best is not None:
        harness.run("fresh rounds", [ConfirmationTask(best)], make, _confirm)


def _reconstruction_runs(benchmark: PrivacyBenchmark) -> ReconstructionRuns:
    study, hospitals = benchmark.study, benchmark.hospitals
    folder = benchmark.output / "reconstruction"
    return ReconstructionRuns(benchmark.config.reconstruction, hospitals, benchmark.modality, study.base_model, folder)


def _reconstruct(runs: ReconstructionRuns, task: RequestTask) -> dict[str, object]:
    return runs.attack(task.request)


def _confirm(runs: ReconstructionRuns, task: ConfirmationTask) -> dict[str, object]:
    return runs.confirm(task.request)


def _quality(benchmark: PrivacyBenchmark, harness: Harness) -> None:
    _trainings(benchmark, harness, "quality", benchmark.trainings)


def _starts(benchmark: PrivacyBenchmark, harness: Harness) -> None:
    _trainings(benchmark, harness, "starts", benchmark.other_trainings)


def _trainings(benchmark: PrivacyBenchmark, harness: Harness, part: str, trainings: Sequence[PrivacyTraining]) -> None:
    make = functools.partial(QualityRuns, benchmark)
    tasks = [PartTask(part, training) for training in trainings]
    missing = [task for task in tasks if harness.store.read(task.name) is None]
    if missing:
        with harness.console.status("patients"):
            make().prepare()
    starts = [
        StartTask(task.training.setting.rank, task.training.seed, task.training.start)
        for task in missing
        if task.training.setting.warm_start
    ]
    # each start is a file of its own, and reading one that is there takes no time
    harness.run("public starts", list(dict.fromkeys(starts)), make, _public_start, done=lambda task: False)
    harness.run("trainings", missing, make, _train)


def _public_start(runs: QualityRuns, task: StartTask) -> None:
    runs.public_start((task.rank, task.seed, task.start))


def _train(runs: QualityRuns, task: PartTask) -> dict[str, object]:
    return runs.run(task.training)


PARTS = {
    "cost": _cost,
    "kills": _kills,
    "sums": _sums,
    "norms": _norms,
    "attacks": _attacks,
    "reconstruction": _reconstruction,
    "quality": _quality,
    "starts": _starts,
}
