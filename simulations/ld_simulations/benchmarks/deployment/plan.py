"""The plan of the deployment benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ld_common.core.config import load_config, require
from ld_simulations.benchmarks.harness import read_table
from ld_simulations.demo import Demo, load_demo

PARTS = ("soak", "intruders", "resume", "overhead")
PART_RESULTS = "parts"
"""Key in `deployment.json` of the results that its flat numbers are computed from."""


@dataclass
class DeploymentBenchmarkConfig:
    """What is measured of a deployed study."""

    output: str = "runs/benchmark_deployment"
    """Folder of every deployment and result; parts that have a result are not run again."""
    results: str = "docs/benchmarks"
    """Folder of the page and its numbers."""
    adopt: str = ""
    """A `deployment.json` of an earlier run; its parts count as done."""
    demo: str = "soak_demo.yaml"
    """YAML of the demo whose study is deployed, relative to this file."""
    overrides: list[str] = field(default_factory=list)
    """`key=value` of the demo, its study or its hospitals."""
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    minutes: float = 10.0
    """Length of the soak."""
    least_kills: int = 30
    """The soak goes on until this many processes were killed."""
    seed: int = 0
    """Seed of the choice of what is killed, and when."""

    def __post_init__(self) -> None:
        for part in self.parts:
            require(part in PARTS, f"parts: '{part}' is not one of {', '.join(PARTS)}")
        require(self.minutes > 0, f"minutes is {self.minutes}: it must be above 0")


@dataclass(frozen=True)
class DeploymentBenchmark:
    """The config and its folder."""

    config: DeploymentBenchmarkConfig
    folder: Path

    @property
    def output(self) -> Path:
        """Folder of deployments and results."""
        return Path(self.config.output).resolve()

    def demo(self, overrides: list[str] | None = None) -> Demo:
        """The demo whose study is deployed, with further `key=value`."""
        place = f"output={self.output / 'demo'}"
        return load_demo(self.folder / self.config.demo, [place, *self.config.overrides, *(overrides or [])])


def load_deployment_benchmark(path: Path, overrides: list[str]) -> DeploymentBenchmark:
    """Read the benchmark's config; raises `ConfigError`."""
    return DeploymentBenchmark(load_config(DeploymentBenchmarkConfig, path, overrides), path.parent)


def adopted_results(benchmark: DeploymentBenchmark) -> dict[str, object]:
    """Results of the table that the config adopts, by part; raises `ConfigError` where it cannot be read."""
    if not benchmark.config.adopt:
        return {}
    parts: dict[str, object] = read_table(benchmark.config.adopt, "deployment", (PART_RESULTS,))[PART_RESULTS]
    return parts
