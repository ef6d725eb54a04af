"""`make soak`: run each part, then write the page of all parts that have run."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.core.atomic_files import write_bytes
from ld_common.core.command import run_cli
from ld_common.core.config import load_config, require
from ld_simulations.benchmarks.deployment.intruders import try_intruders
from ld_simulations.benchmarks.deployment.report import write_report
from ld_simulations.benchmarks.deployment.rounds import overhead, rounds_of, run_to_release
from ld_simulations.benchmarks.deployment.soak import Soak
from ld_simulations.benchmarks.deployment.stage import Deployment
from ld_simulations.demo import Demo, load_demo, prepare_sites

PARTS = ("soak", "intruders", "resume", "overhead")
ROUNDS = 4
BROKEN_AFTER = 2

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()


@dataclass
class SoakConfig:
    """What is measured of a deployed study."""

    output: str = "runs/soak"
    results: str = "docs/benchmarks"
    """Folder of the page and its numbers."""
    demo: str = "soak_demo.yaml"
    """The study and its hospitals, relative to this file."""
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    minutes: float = 10.0
    """How long processes are killed."""
    least_kills: int = 30
    """The soak goes on until there were as many."""
    seed: int = 0

    def __post_init__(self) -> None:
        for part in self.parts:
            require(part in PARTS, f"parts: '{part}' is none of {', '.join(PARTS)}")
        require(self.minutes > 0, f"minutes is {self.minutes}: it must be above 0")


@cli.command()
def measure(
    config: Path = typer.Option(..., help="YAML of the soak, for example configs/soak.yaml."),
    overrides: list[str] = typer.Argument(None, help="key=value, for example minutes=2 parts=[soak]."),
) -> None:
    """Deploy a study on this machine, kill it, break into it, resume it, time it; write the page."""
    settings = load_config(SoakConfig, config, overrides or [])
    output = Path(settings.output).resolve()
    for part in settings.parts:
        console.print(f"[bold]{part}")
        result = RUNNERS[part](settings, config)
        write_bytes(output / f"{part}.json", (json.dumps(result, indent=1) + "\n").encode())
    for file in write_report(output, Path(settings.results)):
        console.print(f"wrote {file}", soft_wrap=True)


def _soak(settings: SoakConfig, config: Path) -> dict[str, Any]:
    stage = _deploy(settings, _demo(settings, config, []), "soak")
    with stage.served():
        seen = Soak(stage, settings.seed, _say).run(settings.minutes * 60, settings.least_kills)
    return asdict(seen) | {"kills": dict(sorted(seen.kills.items())), "sites": len(stage.sites)}


def _intruders(settings: SoakConfig, config: Path) -> dict[str, Any]:
    stage = _deploy(settings, _demo(settings, config, []), "intruders")
    with stage.served():
        for name in stage.sites:
            stage.start(name)
        refused = try_intruders(stage)
    for name, held in refused.items():
        _say(f"{name}: {'refused' if held else 'GOT IN'}")
    return {"attempts": refused}


def _resume(settings: SoakConfig, config: Path) -> dict[str, Any]:
    adapters, rounds = [], {}
    for name, broken_after in (("unbroken", 0), ("resumed", BROKEN_AFTER)):
        stage = _deploy(settings, _plain(settings, config), name)
        with stage.served():
            adapters.append(run_to_release(stage, broken_after))
        rounds[name] = rounds_of(stage)
        _say(f"{name}: {len(rounds[name])} rounds, adapter of {len(adapters[-1])} bytes")
    return {"identical": adapters[0] == adapters[1], "rounds": ROUNDS, "killed_after_round": BROKEN_AFTER, **rounds}


def _overhead(settings: SoakConfig, config: Path) -> dict[str, Any]:
    kept = Path(settings.output) / "resume.json"
    rounds = (json.loads(kept.read_text()) if kept.exists() else _resume(settings, config))["unbroken"]
    return overhead(_plain(settings, config), rounds)


RUNNERS = {"soak": _soak, "intruders": _intruders, "resume": _resume, "overhead": _overhead}


def _demo(settings: SoakConfig, config: Path, overrides: list[str]) -> Demo:
    demo = Path(settings.output).resolve() / "demo"
    return load_demo(config.parent / settings.demo, [f"output={demo}", f"overrides=[{','.join(overrides)}]"])


def _plain(settings: SoakConfig, config: Path) -> Demo:
    """The study without privacy: its noise comes from the operating system and no two runs are the same."""
    return _demo(settings, config, ["privacy.enabled=false", f"federation.rounds={ROUNDS}", "training.steps=10"])


def _deploy(settings: SoakConfig, demo: Demo, name: str) -> Deployment:
    folder = Path(settings.output).resolve() / "deployed" / name
    shutil.rmtree(folder, ignore_errors=True)
    return Deployment(demo.study_file, demo.config.overrides, prepare_sites(demo), folder)


def _say(line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def main() -> None:
    """The entry point."""
    run_cli(cli)


if __name__ == "__main__":
    main()
