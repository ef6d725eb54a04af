"""`ld-simulate`: a whole federation of demo hospitals on this machine, from nothing to its report."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from ld_common.core.command import loading, run_cli

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@cli.command()
def simulate(
    config: Path = typer.Option(..., help="YAML of the demo, for example configs/demo.yaml."),
    overrides: list[str] = typer.Argument(None, help="key=value, for example reuse=true."),
) -> None:
    """Make hospitals, index them, train them together, draw counterfactuals of held-out patients, report."""
    with loading(Console()):
        from ld_simulations.simulate import run_demo

    run_demo(config, overrides or [])


def main() -> None:
    """Entry point of `ld-simulate`."""
    run_cli(cli)
