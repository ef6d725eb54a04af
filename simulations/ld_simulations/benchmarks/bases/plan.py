"""The plan of the benchmark of bases."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ld_common.core.config import load_config, require


@dataclass
class BasesConfig:
    """What is measured of each base."""

    results: str = "docs/benchmarks"
    """Folder of the page and its numbers."""
    drift_steps: list[int] = field(default_factory=lambda: [10, 20, 50])
    """Sampler steps at which a drift has to reach its target."""
    drift_samples: int = 20_000
    """Samples whose mean is taken."""
    processes: int = 2
    """That train one adapter together."""
    repeats: int = 5
    """Of each timed step; the fastest counts."""

    def __post_init__(self) -> None:
        require(bool(self.drift_steps) and min(self.drift_steps) > 1, "drift_steps: give numbers of 2 and more")
        require(self.drift_samples > 1, f"drift_samples is {self.drift_samples}: it must be above 1")
        require(self.processes > 1, f"processes is {self.processes}: it must be above 1")
        require(self.repeats > 0, f"repeats is {self.repeats}: it must be above 0")


def load_bases_config(path: Path, overrides: list[str]) -> BasesConfig:
    """Read the benchmark's config; raises `ConfigError`."""
    return load_config(BasesConfig, path, overrides)
