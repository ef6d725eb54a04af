"""`ld-simulate`: a whole federation of simulated hospitals on this machine, from nothing to its report."""

from __future__ import annotations

from pathlib import Path

import click
import typer
from rich.console import Console
from typer.core import TyperGroup

from ld_common.core.command import VERSION, Json, loading, print_json, run_cli
from ld_simulations.run_folder import claim, locked, remove_parts, remove_run

RUN = "run"


class DefaultRunGroup(TyperGroup):
    """Runs the demo where the first argument names no subcommand."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """`ld-simulate --config FILE` is `ld-simulate run --config FILE`."""
        if arguments and arguments[0] not in (*self.commands, "--help", "--version"):
            arguments = [RUN, *arguments]
        return super().parse_args(context, arguments)


cli = typer.Typer(
    cls=DefaultRunGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


@cli.callback()
def describe(version: bool = VERSION) -> None:
    """Run a federation of simulated hospitals on this machine: ld-simulate --config FILE [KEY=VALUE]..."""


@cli.command(RUN)
def run(
    config: Path = typer.Option(..., help="YAML of the demo, for example configs/demo.yaml."),
    fresh: bool = typer.Option(
        False, "--fresh", help="Remove what an earlier run of this config made, and start anew."
    ),
    ray_address: str = typer.Option(
        "",
        metavar="HOST:PORT",
        help="Train on all nodes of a running Ray cluster that this machine belongs to.",
    ),
    as_json: Json = False,
    overrides: list[str] = typer.Argument(
        None,
        metavar="[KEY=VALUE]...",
        help="Keys of the demo, its study or its hospitals, for example federation.rounds=2 patients=8.",
    ),
) -> None:
    """Make hospitals, index them, train them together, draw counterfactuals of test patients and write a report.

    The same command resumes an interrupted run. A finished release is not trained again.
    """
    from ld_simulations.demo import load_demo

    console = Console(stderr=as_json)
    chosen = [f"ray_address={ray_address}"] if ray_address else []
    demo = load_demo(config, [*(overrides or []), *chosen])
    with locked(demo.output):
        if claim(demo.output, demo.content()) and fresh:
            remove_parts(demo.output)
            claim(demo.output, demo.content())
        try:
            with loading(console):
                from ld_simulations.simulate import run_demo

            summary = run_demo(demo, console)
        except KeyboardInterrupt:
            console.print(f"interrupted: the same command resumes this run in {demo.output}", soft_wrap=True)
            raise typer.Exit(130) from None
    if as_json:
        print_json(summary)


@cli.command()
def clean(output: Path = typer.Option(..., help="Output folder of a run.")) -> None:
    """Remove what a run made, and nothing else."""
    for path in remove_run(output):
        print(f"removed {path}")


def main() -> None:
    """Entry point of `ld-simulate`."""
    run_cli(cli)


if __name__ == "__main__":
    main()
