"""The plan of the security benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ld_common.core.config import load_config, require

PARTS = ("fuzz", "attempts")
FILES = {
    "dicom": 7000,
    "nifti": 4000,
    "png": 2500,
    "safetensors": 2000,
    "archive": 2000,
    "table": 2000,
    "manifest": 1500,
    "config": 1000,
}
"""Mutated files by kind; those that are built to hurt are read in addition."""


@dataclass
class SecurityConfig:
    """How many files are tried, and where the results go."""

    output: str = "runs/benchmark_security"
    """Folder of the results and of the files that failed; what has a result is not run again."""
    results: str = "docs/benchmarks"
    """Folder of the page and its numbers."""
    project: str = "."
    """The repository's folder, whose tests are run."""
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    files: dict[str, int] = field(default_factory=lambda: dict(FILES))
    """Number of mutated files by kind."""
    seed: int = 0
    workers: int = 2
    hang_seconds: float = 10.0
    memory_mib: int = 1024

    def __post_init__(self) -> None:
        for part in self.parts:
            require(part in PARTS, f"parts: '{part}' is not one of {', '.join(PARTS)}")
        for kind, number in self.files.items():
            require(kind in FILES, f"files: '{kind}' is not one of {', '.join(FILES)}")
            require(number >= 0, f"files.{kind} is {number}: it must not be negative")
        require(self.workers >= 1, f"workers is {self.workers}: use at least 1")


def load_security_config(path: Path, overrides: list[str]) -> SecurityConfig:
    """Read the config; raises `ConfigError`."""
    return load_config(SecurityConfig, path, overrides)
