"""`ld-evaluate`: the table of latent drift, or how good a release's counterfactuals are."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from ld_common.core.command import loading, run_cli
from ld_common.core.errors import RequestError

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@cli.command()
def evaluate(
    config: Path | None = typer.Option(None, help="YAML of the benchmark, for example configs/benchmark_ld.yaml."),
    only_report: bool = typer.Option(False, help="Train nothing: write the table of the results that there are."),
    release: Path | None = typer.Option(None, help="In place of --config: a release whose counterfactuals are judged."),
    data: Path | None = typer.Option(None, help="With --release: folder with scans.csv (patient, input, attributes)."),
    reference: Path | None = typer.Option(None, help="With --release: such a table of other patients, for judges."),
    editor: list[str] = typer.Option([], help="With --release: an editor; repeatable. By default its own."),
    seeds: int = typer.Option(3, help="With --release: how often editors that draw noise are asked."),
    base: str | None = typer.Option(None, help="With --release: its base model, if not where it says."),
    out: Path = typer.Option(Path("evaluation"), help="With --release: folder for the table."),
    overrides: list[str] = typer.Argument(
        None, help="key=value: of the benchmark, seeds=[0] device=cuda workers=8; with --release cycles, cycled."
    ),
) -> None:
    """SampleJudge a release's counterfactuals on scans, or (--config) fill the table of latent drift.

    The latter trains every adapter, draws with and without drift and under each control, measures, writes the table.
    """
    if (config is None) == (release is None) or (release is None) != (data is None):
        raise RequestError("give --config, or --release with --data")
    with loading(Console()):
        from ld_simulations.benchmarks.latent_drift import run

    if config is not None:
        run.fill_table(config, overrides or [], only_report)
    if release is not None and data is not None:
        run.judge(release, data, reference, editor, seeds, base, out, overrides or [])


def main() -> None:
    """Entry point of `ld-evaluate`."""
    run_cli(cli)


if __name__ == "__main__":
    main()
