"""`ld-generate`: counterfactuals of scans, drawn with a release."""

from __future__ import annotations

import typer

from ld_common.core.command import VERSION, grouped, run_cli
from ld_generate.commands.batch import batch
from ld_generate.commands.edit import edit
from ld_generate.commands.import_lora import import_release
from ld_generate.commands.sample import sample
from ld_generate.commands.send import send
from ld_generate.commands.serve import serve
from ld_generate.commands.sweep import sweep
from ld_generate.commands.volume import volume

RENAMED = {
    "--given": "--source",
    "--set": "--target",
    "--strength": "--guidance-scale",
    "--depth": "--noise-fraction",
    "--method": "--editor",
    "--mask": "--preserve-mask",
    "--mark": "--watermark",
    "--released": "--burned-in-text-checked",
    "--seeds": "--num-seeds",
    "--release": "edit RELEASE",
    "--batch": "batch RELEASE TABLE",
    "--volume": "volume RELEASE",
    "--trajectory": "sweep RELEASE age=60:90:5",
}
"""Former options, and the options or commands that took their place."""

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@cli.callback()
def describe(version: bool = VERSION) -> None:
    """Draw counterfactuals of scans with a release: the same patient, older, of the other sex, ill or well."""


cli.command("edit")(grouped(edit))
cli.command("sweep")(grouped(sweep))
cli.command("volume")(grouped(volume))
cli.command("batch")(grouped(batch))
cli.command("sample")(grouped(sample))
cli.command("serve")(grouped(serve))
cli.command("send")(grouped(send))
cli.command("import")(grouped(import_release))


def main() -> None:
    """Entry point of `ld-generate`."""
    run_cli(cli, renamed=RENAMED)
