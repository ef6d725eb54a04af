"""`ld-evaluate-privacy`: run what is not there yet of each part, then write the tables."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from ld_common.core.command import loading, run_cli

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@cli.command()
def evaluate(
    config: Path = typer.Option(..., help="YAML of the benchmark, for example configs/benchmark_privacy.yaml."),
    only_report: bool = typer.Option(False, help="Run nothing: write the tables of the results that there are."),
    overrides: list[str] = typer.Argument(None, help="key=value, for example parts=[cost,sums] seeds=[0] device=cuda."),
) -> None:
    """Measure what privacy costs and brings, part by part, and write the tables."""
    with loading(Console()):
        from ld_simulations.benchmarks.privacy.run import fill_tables

    fill_tables(config, overrides or [], only_report)


def main() -> None:
    """Entry point of `ld-evaluate-privacy`."""
    run_cli(cli)


if __name__ == "__main__":
    main()
