"""`ld-benchmark`: the studies that the numbers in docs/benchmarks come from."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from ld_common.core.command import VERSION, loading, run_cli

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@cli.callback()
def describe(version: bool = VERSION) -> None:
    """Run a study and write its page. A stopped study resumes; what has a result is not run again."""


@dataclass(frozen=True)
class Study:
    """A subcommand; the module of `load` imports no model library, that of `run` may."""

    name: str
    help: str
    config: Path
    load: str
    """`module:function` of the config's path and overrides; it raises `ConfigError`."""
    run: str
    """`module:function` of what `load` returned, `only_report` and a console; it returns the files written."""


CONFIGS = Path("configs")
PACKAGE = "ld_simulations.benchmarks"
STUDIES = (
    Study(
        "latent-drift",
        "Sample quality of every adapter with and without drift, and under each control.",
        CONFIGS / "benchmark_latent_drift.yaml",
        f"{PACKAGE}.latent_drift.plan:load_benchmark",
        f"{PACKAGE}.latent_drift.run:run",
    ),
    Study(
        "counterfactuals",
        "Counterfactuals of every editor against the true ones and against follow-ups.",
        CONFIGS / "benchmark_counterfactuals.yaml",
        f"{PACKAGE}.counterfactuals.plan:load_counterfactuals",
        f"{PACKAGE}.counterfactuals.run:run",
    ),
    Study(
        "privacy",
        "Cost and utility of differential privacy and secure aggregation, and attacks on trained models.",
        CONFIGS / "benchmark_privacy.yaml",
        f"{PACKAGE}.privacy.plan:load_privacy_benchmark",
        f"{PACKAGE}.privacy.run:run",
    ),
    Study(
        "deployment",
        "A deployed study under random kills, intrusion attempts and a resume, and the cost of its rounds.",
        CONFIGS / "benchmark_deployment.yaml",
        f"{PACKAGE}.deployment.plan:load_deployment_benchmark",
        f"{PACKAGE}.deployment.run:run",
    ),
    Study(
        "bases",
        "Every base that loads, through one suite: exactness, drift, what fits.",
        CONFIGS / "benchmark_bases.yaml",
        f"{PACKAGE}.bases.plan:load_bases_config",
        f"{PACKAGE}.bases.run:run",
    ),
    Study(
        "gpu",
        "What only a GPU shows: its arithmetic, speed and memory.",
        CONFIGS / "benchmark_gpu.yaml",
        f"{PACKAGE}.gpu.plan:load_gpu_config",
        f"{PACKAGE}.gpu.run:run",
    ),
    Study(
        "stable-diffusion-cost",
        "Time and memory of Stable Diffusion's UNets on this machine.",
        CONFIGS / "benchmark_stable_diffusion_cost.yaml",
        f"{PACKAGE}.stable_diffusion.plan:load_cost_config",
        f"{PACKAGE}.stable_diffusion.cost:run",
    ),
    Study(
        "performance",
        "Speed and memory of training, editing, rounds and the server, as ratios.",
        CONFIGS / "benchmark_performance.yaml",
        f"{PACKAGE}.performance.plan:load_performance_config",
        f"{PACKAGE}.performance.run:run",
    ),
    Study(
        "burned-in-text",
        "Recall and false alarms of the search for text in pixels.",
        CONFIGS / "benchmark_burned_in_text.yaml",
        f"{PACKAGE}.burned_in_text.run:load_text_benchmark",
        f"{PACKAGE}.burned_in_text.run:run",
    ),
    Study(
        "scans",
        "What is read of scans, its cost in time and memory, and whether it arrives right.",
        CONFIGS / "benchmark_scans.yaml",
        f"{PACKAGE}.scans.plan:load_scans_config",
        f"{PACKAGE}.scans.run:run",
    ),
    Study(
        "security",
        "Hostile files given to every reader, and the tests that are an attacker's attempts.",
        CONFIGS / "benchmark_security.yaml",
        f"{PACKAGE}.security.plan:load_security_config",
        f"{PACKAGE}.security.run:run",
    ),
    Study(
        "individual",
        "Answers for single patients, in raw pixels, against rules without a network.",
        CONFIGS / "benchmark_individual.yaml",
        f"{PACKAGE}.individual.plan:load_individual_config",
        f"{PACKAGE}.individual.run:run",
    ),
    Study(
        "federation",
        "Hospitals that learn together, pooled and alone, and the aggregators compared.",
        CONFIGS / "benchmark_federation.yaml",
        f"{PACKAGE}.federation.plan:load_federation_benchmark",
        f"{PACKAGE}.federation.run:run",
    ),
    Study(
        "network",
        "What the trained network adds to the closed form: pictures from noise, answers, several answers.",
        CONFIGS / "benchmark_network.yaml",
        f"{PACKAGE}.network.plan:load_network_config",
        f"{PACKAGE}.network.run:run",
    ),
    Study(
        "real",
        "Follow-ups of real radiographs and brains against copying and other rules; needs images from elsewhere.",
        CONFIGS / "benchmark_real.yaml",
        f"{PACKAGE}.real.plan:load_real_benchmark",
        f"{PACKAGE}.real.run:run",
    ),
    Study(
        "real-latents",
        "Latent drift of real scans in FLUX.2's latent space, and samples with it; needs images from elsewhere.",
        CONFIGS / "benchmark_real_latents.yaml",
        f"{PACKAGE}.real_latents.plan:load_real_latents",
        f"{PACKAGE}.real_latents.run:run",
    ),
    Study(
        "seen",
        "What a finished demo's report and page show in a browser, at a desk and on a phone.",
        CONFIGS / "benchmark_seen.yaml",
        f"{PACKAGE}.seen.run:load_seen_config",
        f"{PACKAGE}.seen.run:run",
    ),
    Study(
        "house",
        "Size and shape of the code base and its documentation.",
        CONFIGS / "benchmark_house.yaml",
        f"{PACKAGE}.house:load_house_config",
        f"{PACKAGE}.house:run",
    ),
)


def _command_of(study: Study) -> Callable[..., None]:
    def command(
        config: Path = typer.Option(study.config, help="YAML of the study."),
        only_report: bool = typer.Option(
            False, "--only-report", help="Run nothing; write the page from the results that there are."
        ),
        overrides: list[str] = typer.Argument(
            None, metavar="[KEY=VALUE]...", help="Keys of the config, for example output=runs/quick."
        ),
    ) -> None:
        plan = _import(study.load)(config, overrides or [])
        console = Console()
        with loading(console):
            run = _import(study.run)
        for file in run(plan, only_report, console):
            console.print(f"wrote {file}", soft_wrap=True)

    return command


def _import(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


for _study in STUDIES:
    cli.command(_study.name, help=_study.help)(_command_of(_study))


def main() -> None:
    """Entry point of `ld-benchmark`."""
    run_cli(cli)


if __name__ == "__main__":
    main()
