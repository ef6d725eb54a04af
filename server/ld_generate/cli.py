"""`ld-generate`: counterfactuals of scans, drawn with a release."""

from __future__ import annotations

import typer

from ld_common import __version__
from ld_common.core.command import run_cli
from ld_generate.commands.batch import batch
from ld_generate.commands.edit import edit
from ld_generate.commands.import_lora import import_release
from ld_generate.commands.sample import sample
from ld_generate.commands.serve import serve
from ld_generate.commands.sweep import sweep
from ld_generate.commands.volume import volume
from ld_generate.option_groups import Group, add_command

cli = typer.Typer(cls=Group, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


def _print_version(value: bool) -> None:
    if value:
        print(f"ld-generate {__version__}")
        raise typer.Exit


@cli.callback()
def generate(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Draw counterfactuals of scans with a release: the same patient, older, of the other sex, ill or well."""


for _name, _command in (
    ("edit", edit),
    ("sweep", sweep),
    ("volume", volume),
    ("batch", batch),
    ("sample", sample),
    ("serve", serve),
    ("import", import_release),
):
    add_command(cli, _name, _command)


def main() -> None:
    """Entry point of `ld-generate`."""
    run_cli(cli)
