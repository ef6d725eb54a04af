"""The plan of the benchmark of what Stable Diffusion costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ld_common.adapters.registry import ADAPTERS
from ld_common.core.config import load_config, nearest, require

SD_1, SD_XL = NETWORKS = ("stable-diffusion-1", "stable-diffusion-xl")


@dataclass
class CostConfig:
    """What is measured of one UNet."""

    results: str = "docs/benchmarks"
    """Folder of the page and its numbers; measurements of other adapters and devices in it stay."""
    network: str = SD_1
    """`stable-diffusion-1` or `stable-diffusion-xl`."""
    device: str = "cpu"
    precision: str = "float32"
    """`float32` or `bfloat16`."""
    adapters: list[str] = field(default_factory=lambda: ["lora", "custom_diffusion", "full"])
    resolutions: list[int] = field(default_factory=lambda: [64, 128, 256])
    """Image sides that are measured, in pixels."""
    targets: list[int] = field(default_factory=lambda: [512, 1024])
    """Image sides that are extrapolated, unless they are measured."""
    batch: int = 1
    """Images in a step."""

    def __post_init__(self) -> None:
        for name in self.adapters:
            require(name in ADAPTERS, f"adapters: '{name}': {nearest(name, list(ADAPTERS))}")
        require(self.device in ("cpu", "cuda"), f"device is '{self.device}': use cpu or cuda")
        known = ("float32", "bfloat16")
        require(self.precision in known, f"precision is '{self.precision}': use {' or '.join(known)}")
        require(self.batch > 0, f"batch is {self.batch}: it must be above 0")
        require(self.network in NETWORKS, f"network is '{self.network}': use {' or '.join(NETWORKS)}")
        for target in self.targets:
            fits = len(self.resolutions) >= 3 or target in self.resolutions
            require(fits, f"resolutions has {len(self.resolutions)} sides: extrapolation to {target} needs 3")


def load_cost_config(path: Path, overrides: list[str]) -> CostConfig:
    """Read the benchmark's config; raises `ConfigError`."""
    return load_config(CostConfig, path, overrides)
