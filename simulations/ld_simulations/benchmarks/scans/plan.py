"""The plan of the benchmark of reading scans."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ld_common.core.config import load_config, require

PARTS = ("cases", "formats", "layouts", "reading", "reindex", "memory", "pacs")


@dataclass
class ScansConfig:
    """What is read, how often and how much of it, and where the results go."""

    output: str = "runs/benchmark_scans"
    """Folder of the results; parts that have a result are not run again."""
    results: str = "docs/benchmarks"
    """Folder of the page and its numbers."""
    reference: str = "docs/reference"
    """Folder of the page of formats."""
    adopt: str = ""
    """A `scans.json` of an earlier run; its parts count as done."""
    project: str = "."
    """The repository's folder."""
    cases: str = "../shared/cases"
    """Folder of inputs that once came out wrong; they are no part of the project, and none is judged without it."""
    base_model: str = "simulations/tiny_base"
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    seed: int = 0
    """Of the pixels of the trees."""
    slices: int = 40
    """Files of a visit's series."""
    read_patients: int = 25
    """Patients, of two visits each, of the tree that is read without the search for text."""
    searched_patients: int = 5
    """Patients of the tree that is read with it."""
    indexed_patients: int = 50
    """Patients of the tree that is indexed several times."""
    many_patients: int = 250
    """Patients of the tree on which memory is measured."""
    repeats: int = 7
    """Of reading and of the bare loop, interleaved."""
    search_repeats: int = 3
    reindex_repeats: int = 3
    """Of the index of an unchanged tree; the first index and that with one more visit run once."""

    def __post_init__(self) -> None:
        for part in self.parts:
            require(part in PARTS, f"parts: '{part}' is not one of {', '.join(PARTS)}")
        counts = ("slices", "read_patients", "searched_patients", "indexed_patients", "many_patients")
        for name in (*counts, "repeats", "search_repeats", "reindex_repeats"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}: it must be above 0")
        require((Path(self.project) / "ld_common").is_dir(), f"project: '{self.project}' is not this repository")


def load_scans_config(path: Path, overrides: list[str]) -> ScansConfig:
    """Read the config; raises `ConfigError`."""
    return load_config(ScansConfig, path, overrides)
