"""The plan of the benchmark on real latents: what is read, trained and drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ld_common.core.config import load_config, require
from ld_common.imaging.modality import Modality

RADIOGRAPHS, VOLUMES, WEIGHTS = "hannover_covid", "open_ms", "weights"
"""Folders of the data."""
ENCODER, DECODER = "taef2_encoder.pth", "taef2_decoder.pth"


@dataclass
class RealLatentsConfig:
    """What is read, what is trained, and where results go."""

    output: str = "runs/real_latents"
    results: str = "docs/benchmarks"
    adopt: str = ""
    """JSON of an earlier table whose results count as done."""
    data: str = "../shared/data"
    """Folder of the images and weights; where it is absent nothing is run."""
    radiographs: str = "modalities/covid_radiograph.yaml"
    brain: str = "modalities/brain_mri.yaml"
    threads: int = 1
    measured_side: int = 128
    """Pixels on a side of the pictures whose drift is measured; a multiple of 8."""
    drawn_side: int = 64
    """Pixels on a side of the pictures that the network learns; a multiple of 16."""
    crops: int = 10
    base_crops: int = 40
    slices: int = 12
    resamples: int = 1000
    held_out_share: float = 0.34
    images_of_a_patient: int = 4
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    samples: int = 96
    sampling_steps: int = 20
    base_steps: int = 1200
    steps: int = 800
    batch_size: int = 16
    base_learning_rate: float = 1e-3
    learning_rate: float = 2e-3
    """Of fine-tuning."""

    def __post_init__(self) -> None:
        require(self.measured_side % 8 == 0 < self.measured_side, "measured_side must be a multiple of 8")
        require(self.drawn_side % 16 == 0 < self.drawn_side, "drawn_side must be a multiple of 16")
        require(0 < self.held_out_share < 1, "held_out_share must lie between 0 and 1")
        require(self.samples > 1 and self.resamples > 1, "samples and resamples must be 2 or more")
        require(bool(self.seeds), "seeds is empty: give at least one")


@dataclass(frozen=True)
class RealLatentsBenchmark:
    """The config with its modalities read."""

    config: RealLatentsConfig
    radiographs: Modality
    brain: Modality

    @property
    def data(self) -> Path:
        """Folder of the images and weights."""
        return Path(self.config.data).resolve()

    @property
    def output(self) -> Path:
        """Folder of results and caches; the cached pictures are not published."""
        return Path(self.config.output).resolve()

    def missing(self) -> Path | None:
        """The first file or folder of the data that is absent; None where all are there."""
        weights = self.data / WEIGHTS
        needed = (self.data / RADIOGRAPHS, self.data / VOLUMES, weights / ENCODER, weights / DECODER)
        return next((path for path in needed if not path.exists()), None)


def load_real_latents(path: Path, overrides: list[str]) -> RealLatentsBenchmark:
    """Read the config and its modalities; raises `ConfigError`."""
    config = load_config(RealLatentsConfig, path, overrides)
    radiographs, brain = (load_config(Modality, path.parent / file) for file in (config.radiographs, config.brain))
    return RealLatentsBenchmark(config, radiographs, brain)
