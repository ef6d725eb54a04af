"""The plan of the benchmark of the trained network: how it is trained, and what it is asked beside the closed form."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ld_common.core.config import load_config, require
from ld_simulations.benchmarks.individual.plan import PatientsConfig

PLAIN, CENTRED, MIRRORED = "plain", "centred", "mirrored"
TRAININGS = (PLAIN, CENTRED, MIRRORED)


@dataclass
class NetworkConfig:
    """What is trained and judged."""

    output: str = "runs/benchmark_network"
    results: str = "docs/benchmarks"
    hospitals: str = "configs/hospitals.yaml"
    study: str = "configs/demo_study.yaml"
    """Its base, modality, adapter, rounds and training options; the drift is fitted to the same patients."""
    training: PatientsConfig = field(default_factory=PatientsConfig)
    trainings: list[str] = field(default_factory=lambda: list(TRAININGS))
    """`plain`; `centred` on what the drift expects of each visit; `mirrored`: with mirror images of the scans."""
    test: PatientsConfig = field(default_factory=lambda: PatientsConfig(seed=505, patients=100))
    """Nothing was chosen on them; pictures from noise are drawn for their attributes."""
    others: PatientsConfig = field(default_factory=lambda: PatientsConfig(seed=506, patients=100))
    """Real patients that pictures are compared with."""
    sampling_steps: int = 30
    asked_patients: int = 8
    """Of the test patients in each hospital, whose scans are edited."""
    closed_form: dict[str, Any] = field(default_factory=lambda: {"name": "drift"})
    network: dict[str, Any] = field(default_factory=lambda: {"name": "ddpm"})
    """Editor of the trained network."""
    refinements: list[dict[str, float]] = field(default_factory=list)
    """Options of the editor that lets the network redraw the closed form's answer."""
    draws: int = 8
    """Answers of the network to one question, by as many seeds."""
    drawn_patients: int = 4
    """In each hospital, who get so many."""
    workers: int = 2

    def __post_init__(self) -> None:
        seeds = [self.training.seed, self.test.seed, self.others.seed]
        require(len(set(seeds)) == 3, f"training, test and others have the seeds {seeds}: they must differ")
        wrong = [name for name in self.trainings if name not in TRAININGS]
        require(not wrong, f"trainings: {', '.join(wrong)} is not one of {', '.join(TRAININGS)}")
        require(PLAIN in self.trainings, f"trainings must have '{PLAIN}', which edits")
        counts = [self.sampling_steps, self.asked_patients, self.draws, self.drawn_patients, self.workers]
        require(min(counts) > 0, "sampling_steps, asked_patients, draws, drawn_patients and workers must be above 0")
        require(
            self.drawn_patients <= self.asked_patients <= self.test.patients,
            "drawn_patients must not be above asked_patients, nor these above test.patients",
        )


def load_network_config(path: Path, overrides: list[str]) -> NetworkConfig:
    """Read the config; raises `ConfigError`."""
    return load_config(NetworkConfig, path, overrides)
