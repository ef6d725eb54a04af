"""The plan of the federation benchmark: which hospitals learn together, and by which aggregators."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ld_common.core.config import load_config, require

IID, NON_IID = "iid", "non-iid"
FEDPROX = "fedprox"
METHODS = (
    "mean",
    FEDPROX,
    "fedavgm",
    "fedadam",
    "fedyogi",
    "median",
    "ffa",
    "rolora",
    "flexlora",
    "fedex",
    "flora",
    "fedsa",
)
"""Rows of the trained network: aggregators by name, and FedProx at the sites with the mean."""


@dataclass
class FederationBenchmark:
    """What is learned and judged."""

    output: str = "runs/benchmark_federation"
    results: str = "docs/benchmarks"
    adopt: str = ""
    """A `federation.json` of an earlier run; its parts count as done."""
    study: str = "configs/demo_study.yaml"
    """Its base, modality, adapter, training options and recommended editor."""
    hospitals: dict[str, str] = field(default_factory=dict)
    """Hospitals of each split."""
    splits: list[str] = field(default_factory=lambda: [NON_IID, IID])
    tuning_seed: int = 70
    seeds: list[int] = field(default_factory=lambda: [71, 72, 73])
    test_offset: int = 1000
    """Added to a seed, it draws the test patients."""
    test_patients: int = 6
    """In each hospital."""
    rounds: int = 4
    steps: int = 8
    """Of each site in a round."""
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    tried: dict[str, Any] = field(default_factory=dict)
    """Method -> the options that are tried on the tuning seed; the first ones without a trial."""
    workers: int = 2

    def __post_init__(self) -> None:
        drawn = [self.tuning_seed, *self.seeds]
        drawn += [seed + self.test_offset for seed in drawn]
        require(len(set(drawn)) == len(drawn), f"seeds {drawn}: nobody may be in two of them, so all must differ")
        for split in self.splits:
            require(split in self.hospitals, f"splits: hospitals has no '{split}'")
        wrong = [name for name in self.methods if name not in METHODS]
        require(not wrong, f"methods: {', '.join(wrong)} is not one of {', '.join(METHODS)}")
        counts = [self.test_patients, self.rounds, self.steps, self.workers, len(self.seeds)]
        require(min(counts) > 0, "seeds, test_patients, rounds, steps and workers must be above 0")


def load_federation_benchmark(path: Path, overrides: list[str]) -> FederationBenchmark:
    """Read the config; raises `ConfigError`."""
    return load_config(FederationBenchmark, path, overrides)
