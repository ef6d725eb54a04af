"""The plan of the privacy benchmark: its settings, trainings and tables."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from ld_common.core.config import from_mapping, load_config, require
from ld_common.imaging.modality import Modality
from ld_common.protocol.study_config import StudyConfig, load_study
from ld_simulations.benchmarks.harness import read_table
from ld_simulations.benchmarks.privacy.reconstruction_plan import ReconstructionConfig
from ld_simulations.hospitals_config import HospitalsConfig

PARTS = ("cost", "kills", "sums", "norms", "attacks", "reconstruction", "quality", "starts")
RUNS = "runs"
"""Key in `privacy.json` of the results that its flat numbers are computed from: part -> name -> result."""
TABLES = ("epsilon", "patients", "levers")
NO_PRIVACY = "no privacy"
"""Title of the row without differential privacy, which the others are compared with."""
START_ALONE = "public start alone"
"""Title of the row that saw no patient of the hospital."""
AT_ONCE = 32
"""Examples of a private step in one forward pass."""


@dataclass(frozen=True)
class PrivacySetting:
    """One way to train at one hospital."""

    epsilon: float = 8.0
    """Target ε of the run at δ = 0.1 / patients; 0 trains without differential privacy."""
    patients: int = 3000
    expected_batch_size: int = 170
    """Expected number of patients in a step."""
    augmentation_multiplicity: int = 1
    rank: int = 4
    freeze_a: bool = True
    ema: float = 0.9
    steps: int = 100
    """0 keeps the public start, which saw no patient of the hospital."""
    learning_rate: float = 0.01
    max_grad_norm: float = 0.01
    warm_start: bool = True
    """Start from an adapter whose A and B were trained on a public hospital's patients, without noise."""

    @property
    def name(self) -> str:
        """Name of its results."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PrivacyTraining:
    """A setting and the seed of one run."""

    setting: PrivacySetting
    seed: int
    start: str = ""
    """Name of a public start of another anatomy; empty for the public hospital's."""

    @property
    def name(self) -> str:
        """Name of its result."""
        return f"{self.setting.name}-{self.seed}" + (f"-{self.start}" if self.start else "")

    @property
    def kind(self) -> str:
        """Its kind among the attacked trainings: `private` or `overfitted`."""
        return "private" if self.setting.epsilon else "overfitted"


@dataclass
class OtherStartConfig:
    """Public patients of another anatomy; paths are relative to the benchmark's file."""

    hospitals: str = "chest_hospitals.yaml"
    """The last of them is the public one."""
    modality: str = "modalities/chest_radiograph.yaml"


@dataclass
class PrivacyBenchmarkConfig:
    """All parts of the benchmark."""

    RENAMED: ClassVar[dict[str, str]] = {"held_out": "test_patients"}

    output: str = "runs/benchmark_privacy"
    """Folder of every result; a stopped run resumes from it."""
    results: str = "docs/benchmarks"
    adopt: str = ""
    """A `privacy.json` of an earlier run, perhaps of another machine; its results count as done."""
    study: str = "network_study.yaml"
    """YAML of the study whose base, adapter, training and edit options are used, relative to the benchmark's file."""
    hospitals: str = "hospitals.yaml"
    """YAML of hospitals, relative to the benchmark's file: the first is the private one, the last the public one."""
    device: str = "cpu"
    workers: int = 1
    """Processes that train or attack at the same time."""
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    lever_seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the rows of `levers`."""
    setting: dict[str, Any] = field(default_factory=dict)
    """The default `PrivacySetting`, from which each table changes one thing."""
    epsilons: list[float] = field(default_factory=lambda: [10.0, 8.0, 3.0, 1.0])
    patients: list[int] = field(default_factory=lambda: [100, 300, 1000, 3000, 10000])
    levers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Title of the row -> fields of the setting that it changes."""
    other_starts: dict[str, OtherStartConfig] = field(default_factory=dict)
    """Public starts of another anatomy by name, from which the default setting is trained too."""
    other_start_seeds: list[int] = field(default_factory=lambda: [0])
    public_patients: int = 300
    public_steps: int = 1500
    public_learning_rate: float = 0.01
    test_patients: int = 32
    """Patients whose true counterfactuals judge a training."""
    samples: int = 512
    """Samples for the Fréchet distance, and real images of other patients."""
    kills: int = 300
    sums: list[int] = field(default_factory=lambda: [3, 10, 50])
    lengths: list[int] = field(default_factory=lambda: [25_000, 200_000])
    attacked_patients: int = 240
    """Patients of whom a coin lets each into a training; a false positive rate of 1 % needs 100 outside."""
    attacked: dict[str, Any] = field(default_factory=dict)
    """Fields of the `PrivacySetting` of the attacked private training; `patients` is half of `attacked_patients`."""
    overfitted: dict[str, Any] = field(default_factory=dict)
    """Fields of it that the overfitted training changes."""
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.parts) - set(PARTS))
        require(not unknown, f"parts: {', '.join(unknown)} is not one of {', '.join(PARTS)}")
        counts = (
            "workers",
            "public_patients",
            "public_steps",
            "test_patients",
            "samples",
            "kills",
            "attacked_patients",
        )
        for name in counts:
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}: it must be above 0")
        require(bool(self.seeds and self.lever_seeds), "name at least one seed")
        self.base_setting()
        self.attacked_setting(private=False)
        for title, fields in self.levers.items():
            _changed(self.base_setting(), fields, f"levers.{title}")

    def base_setting(self) -> PrivacySetting:
        """The default setting; raises `ConfigError`."""
        return _changed(PrivacySetting(), self.setting, "setting")

    def attacked_setting(self, private: bool) -> PrivacySetting:
        """The setting of a run that is attacked; raises `ConfigError`."""
        fields = {**self.attacked, "patients": max(1, self.attacked_patients // 2)}
        setting = _changed(PrivacySetting(), fields, "attacked")
        return setting if private else _changed(setting, {**self.overfitted, "epsilon": 0.0}, "overfitted")


def _changed(setting: PrivacySetting, fields: dict[str, Any], where: str) -> PrivacySetting:
    unknown = sorted(set(fields) - set(asdict(setting)))
    require(not unknown, f"{where}: {', '.join(unknown)} is not a field of a setting: {', '.join(asdict(setting))}")
    return replace(setting, **fields)


@dataclass(frozen=True)
class PrivacyBenchmark:
    """The config with the files that it names read."""

    config: PrivacyBenchmarkConfig
    study: StudyConfig
    modality: Modality
    hospitals: HospitalsConfig
    folder: Path
    """Folder of the config."""

    @property
    def output(self) -> Path:
        """Where results are kept."""
        return Path(self.config.output)

    def anatomy(self, start: str = "") -> tuple[HospitalsConfig, Modality]:
        """The hospitals of a public start of another anatomy, or the benchmark's own, and their modality."""
        if not start:
            return self.hospitals, self.modality
        chosen = self.config.other_starts[start]
        modality = load_config(Modality, self.folder / chosen.modality)
        return load_config(HospitalsConfig, self.folder / chosen.hospitals), modality

    def tables(self) -> Iterator[tuple[str, str, PrivacySetting]]:
        """Table, title of the row and setting; no privacy comes first, and several tables may share a setting."""
        base = self.config.base_setting()
        yield "epsilon", NO_PRIVACY, replace(base, epsilon=0.0)
        yield "epsilon", START_ALONE, replace(base, epsilon=0.0, steps=0)
        for epsilon in self.config.epsilons:
            yield "epsilon", f"{epsilon:g}", replace(base, epsilon=epsilon)
        yield "patients", START_ALONE, replace(base, epsilon=0.0, steps=0)
        for patients in self.config.patients:
            batch = min(base.expected_batch_size, patients)
            yield "patients", f"{patients}", replace(base, patients=patients, expected_batch_size=batch)
        for rank in dict.fromkeys(
            [base.rank, *(replace(base, **fields).rank for fields in self.config.levers.values())]
        ):
            title = START_ALONE + ("" if rank == base.rank else f", rank {rank}")
            yield "levers", title, replace(base, rank=rank, epsilon=0.0, steps=0)
        yield "levers", "default", base
        for title, fields in self.config.levers.items():
            yield "levers", title, replace(base, **fields)

    def start_of(self, setting: PrivacySetting) -> PrivacySetting | None:
        """The setting that keeps a setting's public start untouched; None where it starts from the plain base."""
        untouched = replace(self.config.base_setting(), rank=setting.rank, epsilon=0.0, steps=0)
        return untouched if setting.warm_start else None

    def other_starts(self) -> Iterator[tuple[str, str, PrivacySetting]]:
        """Start of another anatomy, title of the row and setting; its untouched start comes first."""
        base = self.config.base_setting()
        for start in self.config.other_starts:
            yield start, START_ALONE, replace(base, epsilon=0.0, steps=0)
            yield start, NO_PRIVACY, replace(base, epsilon=0.0)
            yield start, f"{base.epsilon:g}", base

    @property
    def other_trainings(self) -> list[PrivacyTraining]:
        """The trainings from starts of another anatomy."""
        seeds = self.config.other_start_seeds
        return [PrivacyTraining(setting, seed, start) for start, _, setting in self.other_starts() for seed in seeds]

    def seeds_of(self, table: str) -> list[int]:
        """The seeds of a table's rows."""
        return self.config.lever_seeds if table == "levers" else self.config.seeds

    @property
    def trainings(self) -> list[PrivacyTraining]:
        """The trainings of all tables, each once, in the order of the tables."""
        trainings = [
            PrivacyTraining(setting, seed)
            for table in TABLES
            for seed in self.seeds_of(table)
            for name, _, setting in self.tables()
            if name == table
        ]
        return list(dict.fromkeys(trainings))

    @property
    def attacked(self) -> list[PrivacyTraining]:
        """The trainings that are attacked."""
        settings = [self.config.attacked_setting(private) for private in (False, True)]
        return [PrivacyTraining(setting, seed) for seed in self.config.seeds for setting in settings]

    def study_of(self, setting: PrivacySetting, seed: int) -> StudyConfig:
        """The study of a setting at one hospital in one round."""
        study = self.study
        privacy = {
            "enabled": setting.epsilon > 0,
            "target_epsilon": setting.epsilon or 1.0,
            "target_delta": 0.1 / setting.patients,
            "patients": setting.patients,
            "expected_batch_size": setting.expected_batch_size,
            "augmentation_multiplicity": setting.augmentation_multiplicity,
            "max_grad_norm": setting.max_grad_norm,
            "ema": setting.ema,
        }
        batch = setting.expected_batch_size * setting.augmentation_multiplicity
        return from_mapping(
            StudyConfig,
            {
                "seed": seed,
                "adapter": {**study.adapter, "rank": setting.rank, "freeze_a": setting.freeze_a},
                "drift": {"shape": "none"},
                "training": {
                    **vars(study.training),
                    "steps": max(1, setting.steps),
                    "learning_rate": setting.learning_rate,
                    "batch_size": AT_ONCE if setting.epsilon else batch,
                },
                "federation": {"rounds": 1, "weighting": "equal"},
                "privacy": privacy,
            },
        )


def load_privacy_benchmark(path: Path, overrides: list[str]) -> PrivacyBenchmark:
    """Read the benchmark's config and the files that it names; raises `ConfigError`."""
    config = load_config(PrivacyBenchmarkConfig, path, overrides)
    study, modality = load_study(path.parent / config.study)
    return PrivacyBenchmark(
        config, study, modality, load_config(HospitalsConfig, path.parent / config.hospitals), path.parent
    )


def result_name(part: str, name: str) -> str:
    """Name of a result of a part."""
    return f"{part}/{name}"


def adopted_results(benchmark: PrivacyBenchmark) -> dict[str, Any]:
    """Results of the table that the config adopts, by name; raises `ConfigError` where it cannot be read."""
    if not benchmark.config.adopt:
        return {}
    parts: dict[str, dict[str, Any]] = read_table(benchmark.config.adopt, "privacy", (RUNS,))[RUNS]
    return {result_name(part, name): result for part, results in parts.items() for name, result in results.items()}
