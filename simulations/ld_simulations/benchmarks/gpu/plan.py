"""The plan of the benchmark on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ld_common.core.config import load_config, require


@dataclass
class GpuConfig:
    """What is measured, on which device."""

    results: str = "docs/benchmarks"
    """Folder of the numbers."""
    device: str = "cuda"
    """`cpu` tries the script itself, with `full_size: false`."""
    full_size: bool = True
    """Measure networks of the size of Stable Diffusion 1.5 at 512 pixels; otherwise of small width."""
    steps: int = 10
    """Training steps that are timed together."""
    batch_size: int = 8
    repeats: int = 3

    def __post_init__(self) -> None:
        require(self.device in ("cpu", "cuda"), f"device is '{self.device}': use cpu or cuda")
        for name in ("steps", "batch_size", "repeats"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}: it must be above 0")


def load_gpu_config(path: Path, overrides: list[str]) -> GpuConfig:
    """Read the benchmark's config; raises `ConfigError`."""
    return load_config(GpuConfig, path, overrides)
