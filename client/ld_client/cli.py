"""`ld-client`: the command line of a hospital's data manager."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_client.deployment.site_home import SiteHome
from ld_client.layouts.command import import_layout
from ld_client.pacs.command import fetch
from ld_client.site_commands import add_site_commands
from ld_client.survey.commands import survey_app
from ld_client.withdrawal.commands import add_withdrawal_commands
from ld_common.core.command import VERSION, Json, print_json, print_lines, run_cli, stage_bars
from ld_common.core.config import require
from ld_common.core.errors import ApprovalError, DeploymentError

HOME = typer.Option(..., help="The study's folder here, made by ld-client init.")
RENAMED = {"left-out": "exclusions", "--choice": "--estimator"}
"""Former commands and options, and their present names."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
audit_app = typer.Typer(no_args_is_help=True, help="Check the site's log of what ran and what left.")
app.add_typer(audit_app, name="audit")
app.add_typer(survey_app, name="survey")


@app.callback()
def describe(version: bool = VERSION) -> None:
    """Take part in a study as a hospital. Only check, start and pull connect to the study's server.

    Commands take --home HOME; those that need the site's config only take --config FILE in its place.
    """


@app.command()
def init(
    kit: Path = typer.Argument(..., help="The kit that the study sent."),
    home: Path = typer.Option(..., help="Folder for the study here; it will hold the site's private key."),
    fingerprint: str = typer.Option(
        "", help="The study's fingerprint, as its team said by telephone: SHA256:... A new home needs it."
    ),
) -> None:
    """Join a study: check its kit, make the site's key, write a config to fill in."""
    from ld_client.deployment.join import join

    print_lines(*join(kit, home, fingerprint))


@app.command()
def enroll(home: Path = HOME) -> None:
    """Print the site's public keys as one line, for the study's ld-server admit."""
    from ld_client.deployment.join import enrolment

    site = SiteHome(home.resolve())
    site.kit()  # names the remedy where there is none
    print(enrolment(site))
    typer.echo(f"this site's fingerprint, to be said by telephone: {site.public_keys().fingerprint}", err=True)


@app.command()
def approve(
    home: Path = HOME,
    yes: bool = typer.Option(False, "--yes", help="Approve without asking."),
    withdraw: bool = typer.Option(False, "--withdraw", help="Withdraw every approval."),
) -> None:
    """Show what the study would run here and what would leave, and approve it."""
    site = SiteHome(home.resolve())
    kit = site.kit()
    from ld_client.deployment import approve as approving

    if withdraw:
        approving.withdraw(site)
        return print_lines("every approval is withdrawn: nothing runs here")
    from ld_client.deployment.approval_summary import summary_lines

    print_lines(*summary_lines(site))
    if not yes and not typer.confirm("Approve?"):
        raise ApprovalError("nothing was approved")
    approval = approving.approve(site, kit)
    return print_lines(f"approved: code {approval.bundle[:16]}, study {approval.study[:16]}")


@app.command()
def start(
    home: Path = HOME,
    launcher: str = typer.Option(
        "", help="single or accelerate: one process trains a round, or several. The site config's by default."
    ),
    processes: int = typer.Option(
        0, help="Processes that train a round with accelerate; by default the site config's, or one a GPU."
    ),
) -> None:
    """Take part in the study until terminated."""
    require(processes >= 0, f"--processes is {processes}: use 1 or more")
    site = SiteHome(home.resolve())
    site.kit()
    from ld_client.deployment.node import run_node

    run_node(site, launcher, processes)


@app.command()
def pull(
    home: Path = HOME,
    release: str = typer.Option("", help="Name of a release; the newest by default."),
    out: Path | None = typer.Option(None, help="Folder to make; HOME/releases/NAME by default."),
) -> None:
    """Fetch a release of the study, check its signature, and decrypt it if it is encrypted to this site."""
    site = SiteHome(home.resolve())
    site.kit()
    from ld_client.deployment import pull as pulling

    with stage_bars(Console()) as progress:
        lines = pulling.pull(site, release, out, progress)
    print_lines(*lines)


@app.command()
def check(home: Path = HOME, as_json: Json = False) -> None:
    """Check whether this site is ready for its study, with a remedy for each problem; exit code 1 if a check failed."""
    from ld_client.deployment.check import check_home

    console = Console(stderr=as_json)
    with console.status("checking"):
        results = check_home(SiteHome(home.resolve()))
    if as_json:
        print_json([asdict(result) for result in results])
    else:
        table = Table("check", "", Column("result", overflow="fold"), Column("remedy", overflow="fold"))
        for result in results:
            table.add_row(result.name, result.status.value, Text(result.detail), Text(result.remedy))
        console.print(table)
    if any(result.status == "failed" for result in results):
        raise typer.Exit(1)


@app.command("dry-run")
def dry_run(home: Path = HOME) -> None:
    """Run the study's first round on the site's data and list what would leave; nothing is sent or charged."""
    site = SiteHome(home.resolve())
    site.site()
    from ld_client.deployment import dry_run as rehearsal

    with Console(stderr=True).status("training"):
        lines = rehearsal.dry_run(site)
    print_lines(*lines)


@audit_app.command("verify")
def verify(home: Path = HOME, as_json: Json = False) -> None:
    """Verify the audit log: its chain, its signatures, and the heads that the server acknowledged."""
    from ld_client.deployment.audit_verify import verdict_lines, verify_home

    verdict = verify_home(SiteHome(home.resolve()))
    if as_json:
        print_json(verdict)
    else:
        print_lines(*verdict_lines(verdict))
    if verdict.problems:
        raise DeploymentError(f"the audit log has {len(verdict.problems)} problems")


add_site_commands(app)
app.command("import")(import_layout)
add_withdrawal_commands(app)
app.command("fetch")(fetch)


def main() -> None:
    """The entry point `ld-client`; what it and its processes write, only its account can read."""
    os.umask(0o077)
    run_cli(app, renamed=RENAMED)


if __name__ == "__main__":
    main()
