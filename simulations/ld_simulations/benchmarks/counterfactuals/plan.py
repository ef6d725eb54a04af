"""What the table of counterfactuals is made of: releases that are trained, and ways of asking them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ld_common.core.config import load_config, require
from ld_simulations.benchmarks.counterfactuals.judge import JudgeConfig
from ld_simulations.demo import Demo, load_demo


@dataclass
class EditorPlan:
    """One way of asking."""

    release: str = ""
    """Which of `releases` is asked."""
    edit: dict[str, Any] = field(default_factory=dict)
    """Options of the edit that differ from the study's."""
    seeds: int = 1
    """Draws whose mean is the answer, as of `ld-generate --seeds`."""
    modalities: list[str] = field(default_factory=list)
    """On which of `demos`; on all where none is named."""


@dataclass
class CounterfactualsConfig:
    """The whole table."""

    output: str = "runs/benchmark_counterfactuals"
    """Where every release and result is kept; a stopped run goes on from here."""
    results: str = "docs/benchmarks"
    """Where the table goes."""
    adopt: str = ""
    """A `counterfactuals.json` of an earlier run, perhaps of another machine: its results count as done, except of
    editors that are asked otherwise here."""
    workers: int = 1
    """Trainings or judgements at the same time, each a process."""
    seeds: list[int] = field(default_factory=lambda: [0])
    demos: dict[str, str] = field(default_factory=dict)
    """A demo's YAML for each modality, relative to this file."""
    releases: dict[str, list[str]] = field(default_factory=dict)
    """key=value of the demo's study, by the release's name."""
    editors: dict[str, EditorPlan] = field(default_factory=dict)
    """By the name under which the table has it."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    hospitals: list[str] = field(default_factory=list)
    """key=value for the hospitals, for example held_out=2."""

    def __post_init__(self) -> None:
        require(self.workers > 0, f"workers is {self.workers}: it must be above 0")
        require(bool(self.seeds and self.demos and self.editors), "seeds, demos and editors must not be empty")
        for name, plan in self.editors.items():
            known = ", ".join(self.releases)
            require(plan.seeds > 0, f"editors.{name}.seeds is {plan.seeds}: it must be above 0")
            require(plan.release in self.releases, f"editors.{name}: no release '{plan.release}': known: {known}")
            for modality in plan.modalities:
                known = ", ".join(self.demos)
                require(modality in self.demos, f"editors.{name}: no demo '{modality}': known: {known}")


@dataclass(frozen=True, order=True)
class ReleaseTraining:
    """One release."""

    seed: int
    modality: str
    release: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.modality}-{self.release}-{self.seed}"


@dataclass(frozen=True, order=True)
class Asking:
    """One way of asking it."""

    training: ReleaseTraining
    editor: str

    @property
    def name(self) -> str:
        """Of its result."""
        return f"{self.training.modality}-{self.editor}-{self.training.seed}"


@dataclass(frozen=True)
class CounterfactualsBenchmark:
    """The config and its demos."""

    config: CounterfactualsConfig
    folder: Path
    """Of the config."""

    @property
    def output(self) -> Path:
        """Where all of it lies."""
        return Path(self.config.output)

    def demo(self, modality: str, release: str = "", seed: int = 0) -> Demo:
        """The demo whose hospitals are judged on, with the study of a release."""
        chosen = [f"overrides={[*self.config.releases.get(release, []), f'seed={seed}']}"]
        place = f"output={(self.output / modality).resolve()}"
        file = self.folder / self.config.demos[modality]
        return load_demo(file, [place, *chosen, f"hospital_overrides={self.config.hospitals}"])

    @property
    def trainings(self) -> list[ReleaseTraining]:
        """Every release, one seed after the other."""
        return list(dict.fromkeys(asking.training for asking in self.askings))

    @property
    def askings(self) -> Iterator[Asking]:
        """Every way of asking every release."""
        for seed in self.config.seeds:
            for modality in self.config.demos:
                for name, plan in self.config.editors.items():
                    if not plan.modalities or modality in plan.modalities:
                        yield Asking(ReleaseTraining(seed, modality, plan.release), name)


def load_counterfactuals(path: Path, overrides: list[str]) -> CounterfactualsBenchmark:
    """Read the benchmark's config; raises `ConfigError`."""
    return CounterfactualsBenchmark(load_config(CounterfactualsConfig, path, overrides), path.parent)
