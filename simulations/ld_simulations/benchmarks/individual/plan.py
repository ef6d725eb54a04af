"""The plan of the benchmark of individual answers: whom the rules learn from, are tuned on and are judged on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ld_common.core.config import load_config, require
from ld_common.imaging.modality import RENDERINGS
from ld_simulations.benchmarks.individual.private_plan import PrivateDriftConfig


@dataclass
class PatientsConfig:
    """Simulated patients of all hospitals, drawn with one seed."""

    seed: int = 0
    patients: int = 48
    """In each hospital."""


@dataclass
class AnatomyConfig:
    """One part of the body: its hospitals, its modality, and a release to judge."""

    hospitals: str = "configs/hospitals.yaml"
    modality: str = "configs/modalities/brain_mri.yaml"
    renderings: list[str] = field(default_factory=lambda: list(RENDERINGS))
    """Those that are tried."""
    edge_shares: list[float] = field(default_factory=lambda: [1.0, 0.0])
    """Values of `edge_share` of editor `drift`; what is asked with a history is answered by the one that is best for
    one scan."""
    test_patients: int = 0
    """In each hospital; 0 for as many as `test.patients`."""
    release: str = ""
    """Folder of a release, whose recommended editor is a row; empty for none."""
    release_seed: int = 0
    """Seed of the hospitals that the release was trained on."""


@dataclass
class IndividualConfig:
    """What is learned, tuned and judged."""

    output: str = "runs/benchmark_individual"
    results: str = "docs/benchmarks"
    base_model: str = "simulations/tiny_base"
    anatomies: dict[str, AnatomyConfig] = field(default_factory=lambda: {"brain": AnatomyConfig()})
    training: PatientsConfig = field(default_factory=PatientsConfig)
    tuning: PatientsConfig = field(default_factory=lambda: PatientsConfig(seed=101, patients=10))
    test: PatientsConfig = field(default_factory=lambda: PatientsConfig(seed=202, patients=80))
    """Nothing is chosen on them."""
    components: list[int] = field(default_factory=lambda: [16, 48])
    """Principal components of a scan's latents in the longitudinal ridge."""
    scales: list[float] = field(default_factory=lambda: [0.75, 1.0, 1.25, 1.5])
    """Factors of a ridge's change."""
    own_shares: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    """Shares of the patient's own slope where there is a history."""
    time_scales: list[float] = field(default_factory=lambda: [1.1, 1.0, 1.25])
    """Values of `time_scale` of editor `drift`; the first is used where another option is tried."""
    effect_scales: list[float] = field(default_factory=lambda: [1.0, 1.25, 1.5])
    own_slope_halves: list[float] = field(default_factory=lambda: [2.0, 4.0, 8.0])
    own_growth_halves: list[float] = field(default_factory=lambda: [0.1, 0.5, 1.5])
    release_patients: int = 20
    """Test patients of each hospital that the release is judged on, from the first."""
    patients_in_task: int = 10
    workers: int = 2
    private: PrivateDriftConfig = field(default_factory=PrivateDriftConfig)
    """Drifts under differential privacy."""

    def __post_init__(self) -> None:
        seeds = [self.training.seed, self.tuning.seed, self.test.seed]
        require(
            len(set(seeds)) == len(seeds),
            f"training, tuning and test have the seeds {seeds}: nobody may be in two of them, so use three seeds",
        )
        taken = [*seeds, *self.private.seeds]
        require(
            not self.private.patients or len(set(taken)) == len(taken),
            f"private: its seeds {self.private.seeds} and those of the rest, {seeds}, must all differ",
        )
        for name, anatomy in self.anatomies.items():
            require(
                not anatomy.release or anatomy.release_seed not in (self.tuning.seed, self.test.seed),
                f"anatomies.{name}.release saw the hospitals of seed {anatomy.release_seed}, which tune or test",
            )
            wrong = [rendering for rendering in anatomy.renderings if rendering not in RENDERINGS]
            require(not wrong, f"anatomies.{name}.renderings: {', '.join(wrong)} is not one of {', '.join(RENDERINGS)}")
        counts = [self.training.patients, self.tuning.patients, self.test.patients, self.patients_in_task]
        require(min(counts) > 0, "patients and patients_in_task must be above 0")


def load_individual_config(path: Path, overrides: list[str]) -> IndividualConfig:
    """Read the config; raises `ConfigError`."""
    return load_config(IndividualConfig, path, overrides)
