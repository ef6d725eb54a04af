"""What the benchmark of privacy measures: its settings, each a run that is kept and can be gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ld_common.core.config import from_mapping, load_config, require
from ld_common.imaging.modality import Modality
from ld_common.protocol.study_config import StudyConfig, load_study
from ld_simulations.hospitals import HospitalsConfig

PARTS = ("cost", "kills", "sums", "norms", "attacks", "quality")
TABLES = ("epsilon", "patients", "levers")
NO_PRIVACY = "no privacy"
"""Title of the row that the others are compared with."""
START_ALONE = "public start alone"
"""Title of the row that no patient of the hospital has a part in."""
AT_ONCE = 32
"""LossSampler of a private step that pass the network together."""


@dataclass(frozen=True)
class PrivacySetting:
    """One way to train at one hospital."""

    epsilon: float = 8.0
    """Target ε of the run at δ = 1 / (10 patients); 0 for training without differential privacy."""
    patients: int = 3000
    expected_batch_size: int = 170
    """Expected number of patients in a step."""
    augmentation_multiplicity: int = 1
    rank: int = 4
    freeze_a: bool = True
    ema: float = 0.9
    steps: int = 100
    """0 for the public start as it is, which no patient of the hospital has a part in."""
    learning_rate: float = 0.01
    max_grad_norm: float = 0.01
    warm_start: bool = True
    """Start from an adapter that learned from a public hospital's patients, both A and B, without noise."""

    @property
    def name(self) -> str:
        """Of its results' files."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PrivacyTraining:
    """A setting and the seed of one run."""

    setting: PrivacySetting
    seed: int

    @property
    def name(self) -> str:
        """Of its result's file."""
        return f"{self.setting.name}-{self.seed}"

    @property
    def kind(self) -> str:
        """What it is among the attacked ones: `private` or `overfitted`."""
        return "private" if self.setting.epsilon else "overfitted"


@dataclass
class PrivacyBenchmarkConfig:
    """All parts of the benchmark."""

    output: str = "runs/benchmark_privacy"
    """Where every result is kept; a stopped run goes on from here."""
    results: str = "docs/benchmarks"
    adopt: str = ""
    """A `privacy.json` of an earlier run, perhaps of another machine: its results count as done."""
    study: str = "demo_study.yaml"
    """YAML of the study whose base, layers, losses and edits are used, relative to the benchmark's file."""
    hospitals: str = "hospitals.yaml"
    """YAML of hospitals, relative to the benchmark's file: the first is the private one, the last the public one."""
    device: str = "cpu"
    workers: int = 1
    """Trainings and attacks at a time, each in a process of its own."""
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    lever_seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the rows of `levers`."""
    setting: dict[str, Any] = field(default_factory=dict)
    """The default `PrivacySetting`, from which each table changes one thing."""
    epsilons: list[float] = field(default_factory=lambda: [10.0, 8.0, 3.0, 1.0])
    patients: list[int] = field(default_factory=lambda: [100, 300, 1000, 3000, 10000])
    levers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What is changed, in words -> fields of the setting."""
    public_patients: int = 300
    public_steps: int = 1500
    public_learning_rate: float = 0.01
    held_out: int = 32
    """Patients whose true counterfactuals judge a run."""
    samples: int = 512
    """PictureSet for the Fréchet distance, and real ones of other patients."""
    kills: int = 300
    sums: list[int] = field(default_factory=lambda: [3, 10, 50])
    lengths: list[int] = field(default_factory=lambda: [25_000, 200_000])
    attacked_patients: int = 240
    """Of whom coins let half into the overfitted run and into a private one; 100 left out show a rate at 1 %."""
    attacked: dict[str, Any] = field(default_factory=dict)
    """Fields of the `PrivacySetting` of the private run that is attacked; `patients` is half of `attacked_patients`."""
    overfitted: dict[str, Any] = field(default_factory=dict)
    """What the overfitted run changes of it."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.parts) - set(PARTS))
        require(not unknown, f"parts: {', '.join(unknown)} is none of {', '.join(PARTS)}")
        counts = ("workers", "public_patients", "public_steps", "held_out", "samples", "kills", "attacked_patients")
        for name in counts:
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}: it must be above 0")
        require(bool(self.seeds and self.lever_seeds), "name at least one seed")
        self.base_setting()
        self.attacked_setting(private=False)
        for words, fields in self.levers.items():
            _changed(self.base_setting(), fields, f"levers.{words}")

    def base_setting(self) -> PrivacySetting:
        """The default setting; raises `ConfigError`."""
        return _changed(PrivacySetting(), self.setting, "setting")

    def attacked_setting(self, private: bool) -> PrivacySetting:
        """The setting of a run that is attacked; raises `ConfigError`."""
        own = _changed(PrivacySetting(), {**self.attacked, "patients": max(1, self.attacked_patients // 2)}, "attacked")
        return own if private else _changed(own, {**self.overfitted, "epsilon": 0.0}, "overfitted")


def _changed(setting: PrivacySetting, fields: dict[str, Any], where: str) -> PrivacySetting:
    unknown = sorted(set(fields) - set(asdict(setting)))
    require(not unknown, f"{where}: {', '.join(unknown)} is no field of a setting: {', '.join(asdict(setting))}")
    return replace(setting, **fields)


@dataclass(frozen=True)
class PrivacyBenchmark:
    """The config with the files that it names read."""

    config: PrivacyBenchmarkConfig
    study: StudyConfig
    modality: Modality
    hospitals: HospitalsConfig

    @property
    def output(self) -> Path:
        """Where results are kept."""
        return Path(self.config.output)

    def tables(self) -> Iterator[tuple[str, str, PrivacySetting]]:
        """Table, row's title, setting: no privacy first; the same setting may stand in several tables."""
        base = self.config.base_setting()
        yield "epsilon", NO_PRIVACY, replace(base, epsilon=0.0)
        yield "epsilon", START_ALONE, replace(base, epsilon=0.0, steps=0)
        for epsilon in self.config.epsilons:
            yield "epsilon", f"{epsilon:g}", replace(base, epsilon=epsilon)
        for patients in self.config.patients:
            batch = min(base.expected_batch_size, patients)
            yield "patients", f"{patients}", replace(base, patients=patients, expected_batch_size=batch)
        yield "levers", "default", base
        for words, fields in self.config.levers.items():
            yield "levers", words, replace(base, **fields)

    def seeds_of(self, table: str) -> list[int]:
        """The seeds of a table's rows."""
        return self.config.lever_seeds if table == "levers" else self.config.seeds

    @property
    def trainings(self) -> list[PrivacyTraining]:
        """What the tables need, each once, the first table's first."""
        wanted = [
            PrivacyTraining(setting, seed)
            for own in TABLES
            for seed in self.seeds_of(own)
            for table, _, setting in self.tables()
            if table == own
        ]
        return list(dict.fromkeys(wanted))

    @property
    def attacked(self) -> list[PrivacyTraining]:
        """The runs to attack."""
        settings = [self.config.attacked_setting(private) for private in (False, True)]
        return [PrivacyTraining(setting, seed) for seed in self.config.seeds for setting in settings]

    def study_of(self, setting: PrivacySetting, seed: int) -> StudyConfig:
        """The study of a setting at one hospital in one round."""
        study = self.study
        privacy = {
            "enabled": setting.epsilon > 0,
            "target_epsilon": setting.epsilon or 1.0,
            "delta": 0.1 / setting.patients,
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
                "drift": {"mean": "none"},
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
    return PrivacyBenchmark(config, study, modality, load_config(HospitalsConfig, path.parent / config.hospitals))
