"""The plan of the benchmark on real scans: where the data lie, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ld_common.core.config import load_config
from ld_common.imaging.modality import Modality

RADIOGRAPHS, VOLUMES, WEIGHTS = "hannover_covid", "open_ms", "weights"
"""Folders of the data."""


@dataclass
class RealConfig:
    """What is read and where results go."""

    output: str = "runs/real"
    results: str = "docs/benchmarks"
    data: str = "../shared/data"
    """Folder of the images and weights; where it is absent nothing is run."""
    base_model: str = "simulations/tiny_base"
    radiographs: str = "modalities/covid_radiograph.yaml"
    with_crp: str = "modalities/covid_radiograph_crp.yaml"
    brain: str = "modalities/brain_mri.yaml"


@dataclass(frozen=True)
class RealBenchmark:
    """The config with its modalities read."""

    config: RealConfig
    radiographs: Modality
    with_crp: Modality
    brain: Modality

    @property
    def data(self) -> Path:
        """Folder of the images and weights."""
        return Path(self.config.data).resolve()

    @property
    def output(self) -> Path:
        """Folder of results and pictures."""
        return Path(self.config.output).resolve()


def load_real_benchmark(path: Path, overrides: list[str]) -> RealBenchmark:
    """Read the config and its modalities; raises `ConfigError`."""
    config = load_config(RealConfig, path, overrides)
    files = (config.radiographs, config.with_crp, config.brain)
    return RealBenchmark(config, *(load_config(Modality, path.parent / file) for file in files))
