"""The plan of the performance benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ld_common.core.config import load_config, require

PARTS = ("training", "generation", "simulated", "deployed", "scale", "wire", "nodes", "ray", "demo")


@dataclass
class PerformanceConfig:
    """What is timed, how often, and where the results go."""

    output: str = "runs/benchmark_performance"
    """Folder of the results; parts that have a result are not run again."""
    results: str = "docs/benchmarks"
    """Folder of the page and its numbers."""
    adopt: str = ""
    """A `performance.json` of an earlier run; its parts count as done."""
    base_model: str = "simulations/tiny_base"
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    repeats: int = 7
    """Of alternatives that are timed in turn."""
    steps: int = 20
    """Training steps that are timed at once."""
    batch_size: int = 8
    study: str = "configs/demo.yaml"
    """Demo whose rounds are timed against the bare loop."""
    round_steps: int = 60
    """Training steps of each of these rounds."""
    sites: int = 1000
    """Stub nodes of a round through a real SuperLink."""
    demo: str = "runs/demo"
    """Folder of a finished `ld-simulate`, whose seconds are taken from its summary."""

    def __post_init__(self) -> None:
        for part in self.parts:
            require(part in PARTS, f"parts: '{part}' is not one of {', '.join(PARTS)}")
        for name in ("repeats", "steps", "batch_size", "round_steps", "sites"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}: it must be above 0")


def load_performance_config(path: Path, overrides: list[str]) -> PerformanceConfig:
    """Read the config; raises `ConfigError`."""
    return load_config(PerformanceConfig, path, overrides)
