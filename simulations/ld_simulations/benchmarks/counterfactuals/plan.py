"""The plan of the counterfactuals benchmark: which releases are trained, and how each is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ld_common.core.config import load_config, require
from ld_evaluate.options import JudgeConfig
from ld_simulations.demo import Demo, load_demo


@dataclass
class EditorPlan:
    """An editor with its options, and the release that it edits with."""

    release: str = ""
    """A key of `releases`."""
    edit: dict[str, Any] = field(default_factory=dict)
    """Options of the editor that differ from the study's `edit`."""
    seeds: int = 1
    """Number of noise seeds whose mean image is judged."""
    modalities: list[str] = field(default_factory=list)
    """Keys of `demos`; empty for all."""


@dataclass
class CounterfactualsConfig:
    """The whole benchmark."""

    output: str = "runs/benchmark_counterfactuals"
    """Folder of every release and result; a stopped run resumes from it."""
    results: str = "docs/benchmarks"
    """Folder of the page and its numbers."""
    adopt: str = ""
    """A `counterfactuals.json` of an earlier run, perhaps of another machine. Its results count as done, except those
    of editors with other options."""
    workers: int = 1
    """Processes that train or judge at the same time."""
    seeds: list[int] = field(default_factory=lambda: [0])
    demos: dict[str, str] = field(default_factory=dict)
    """YAML of a demo for each modality, relative to this file."""
    releases: dict[str, list[str]] = field(default_factory=dict)
    """`key=value` of the demo's study, by the name of the release."""
    editors: dict[str, EditorPlan] = field(default_factory=dict)
    """By the label in the table."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    hospitals: list[str] = field(default_factory=list)
    """`key=value` of the hospitals, for example test_patients=2."""

    def __post_init__(self) -> None:
        require(self.workers > 0, f"workers is {self.workers}: it must be above 0")
        require(bool(self.seeds and self.demos and self.editors), "seeds, demos and editors must not be empty")
        for label, plan in self.editors.items():
            require(plan.seeds > 0, f"editors.{label}.seeds is {plan.seeds}: it must be above 0")
            releases, demos = ", ".join(self.releases), ", ".join(self.demos)
            require(plan.release in self.releases, f"editors.{label}: no release '{plan.release}': known: {releases}")
            for modality in plan.modalities:
                require(modality in self.demos, f"editors.{label}: no demo '{modality}': known: {demos}")


@dataclass(frozen=True, order=True)
class ReleaseTraining:
    """One release."""

    seed: int
    modality: str
    release: str

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.modality}-{self.release}-{self.seed}"


@dataclass(frozen=True, order=True)
class EditorTask:
    """One release judged through one editor."""

    training: ReleaseTraining
    editor: str
    """Label in the table."""

    @property
    def name(self) -> str:
        """Name of its result."""
        return f"{self.training.modality}-{self.editor}-{self.training.seed}"


@dataclass(frozen=True)
class CounterfactualsBenchmark:
    """The config and its demos."""

    config: CounterfactualsConfig
    folder: Path
    """Folder of the config."""

    @property
    def output(self) -> Path:
        """Folder of releases and results."""
        return Path(self.config.output)

    def demo(self, modality: str, release: str = "", seed: int = 0) -> Demo:
        """The demo of a modality, with the study of a release."""
        study = [*self.config.releases.get(release, []), f"seed={seed}"]
        place = f"output={(self.output / modality).resolve()}"
        return load_demo(self.folder / self.config.demos[modality], [place, *study, *self.config.hospitals])

    @property
    def trainings(self) -> list[ReleaseTraining]:
        """Every release, seed by seed."""
        return list(dict.fromkeys(task.training for task in self.tasks))

    @property
    def tasks(self) -> list[EditorTask]:
        """Every editor on its release, seed by seed."""
        return [
            EditorTask(ReleaseTraining(seed, modality, plan.release), label)
            for seed in self.config.seeds
            for modality in self.config.demos
            for label, plan in self.config.editors.items()
            if not plan.modalities or modality in plan.modalities
        ]


def load_counterfactuals(path: Path, overrides: list[str]) -> CounterfactualsBenchmark:
    """Read the benchmark's config; raises `ConfigError`."""
    return CounterfactualsBenchmark(load_config(CounterfactualsConfig, path, overrides), path.parent)
