"""`ld-client`: what a hospital's data manager runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_client.data.exclusions import Exclusion
from ld_client.site_config import load_site
from ld_common.core.command import TRUST_HELP, UNSIGNED_HELP, run_cli, visible
from ld_common.core.errors import ApprovalError, DeploymentError, StoreError

if TYPE_CHECKING:
    from ld_common.release.release import Release

SHOWN = 20
CONFIG = typer.Option(..., "--config", help="The site's YAML file.")
HOME = typer.Option(..., help="The study's folder here, made by ld-client init.")
TRUST = typer.Option("", help=TRUST_HELP)
UNSIGNED = typer.Option(False, "--allow-unsigned", help=UNSIGNED_HELP)
OVERRIDES = typer.Argument(None, metavar="[KEY=VALUE]...", help="Replace values of the YAML file.")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
audit_app = typer.Typer(no_args_is_help=True, help="The site's log of what ran and what left.")
app.add_typer(audit_app, name="audit")


@app.callback()
def describe() -> None:
    """A hospital's side of a federation. Only start, check and pull speak to the study's server."""


@app.command()
def index(config: Path = CONFIG, overrides: list[str] = OVERRIDES) -> None:
    """Read the site's scans and table and cache what training needs."""
    from ld_client.data.store import build_store  # torch and diffusers take seconds to import; --help needs neither

    site = load_site(config, overrides or [])
    console = Console()
    with progress_bar(console) as progress:
        summary = build_store(site, progress)
    counts = Table("patients", "visits", "pairs", "left out", title=f"Store of {site.site}")
    counts.add_row(*map(str, (summary.patients, summary.visits, summary.pairs, len(summary.left_out))))
    console.print(counts)
    show_exclusions(console, summary.left_out, f"ld-client left-out --config {config}")
    if not summary.visits:
        raise StoreError("no visit could be used: see the reasons above")
    console.print(f"wrote {site.store}", soft_wrap=True, highlight=False)


@app.command()
def drift(
    config: Path = CONFIG,
    study: Path = typer.Option(..., help="The study's YAML file."),
    choice: str = typer.Option("", help="moments, grid or counterfactual; by default the study's."),
    release: Path | None = typer.Option(None, help="Try with this release's adapter, not the plain base."),
    trust: str = TRUST,
    allow_unsigned: bool = UNSIGNED,
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Replace values of the study."),
) -> None:
    """Show the drift that a study would give this site, and the loss of each δ where it searches for one."""
    from ld_client.drift_report import show_drift

    trained = None if release is None else _trusted(release, trust, allow_unsigned)
    with progress_bar(Console()) as progress:
        lines = show_drift(load_site(config), study, choice, trained, overrides or [], progress)
    for line in lines:
        Console().print(line, soft_wrap=True)


@app.command()
def budget(
    config: Path = CONFIG,
    study: Path | None = typer.Option(None, help="Say what this study would cost: its YAML file."),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Replace values of the study."),
) -> None:
    """Show what the data set's privacy was spent on, what is left, and what a study would cost."""
    from ld_client.privacy.budget import budget_lines

    console = Console()
    with console.status("composing the privacy loss"):
        lines = budget_lines(load_site(config), study, overrides or [])
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


@app.command("audit-privacy")
def audit_privacy(
    config: Path = CONFIG,
    release: Path = typer.Option(..., help="Folder of a release that this site took part in."),
    out: Path = typer.Option(..., help="Folder for audit.json; it points to scans and must stay at the site."),
    points: int = typer.Option(32, help="Timesteps and noises at which each scan's loss is taken."),
    generated: int = typer.Option(200, help="Pictures drawn and searched for copies."),
    canaries: int = typer.Option(1000, help="Most patients for whom coins decide a rehearsal; 0: no rehearsal."),
    trust: str = TRUST,
    allow_unsigned: bool = UNSIGNED,
) -> None:
    """Attack a release with this site's own patients: membership, copies, an empirical lower bound on ε."""
    from ld_client.audit.command import run_audit
    from ld_client.audit.run import AuditOptions

    console, trusted = Console(), _trusted(release, trust, allow_unsigned)
    with progress_bar(console) as progress:
        lines = run_audit(load_site(config), trusted, out, AuditOptions(points, generated, canaries), progress)
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


@app.command("privacy-report")
def privacy_report(
    config: Path = CONFIG,
    release: Path = typer.Option(..., help="Folder of a release that this site took part in."),
    audit: Path | None = typer.Option(None, help="The audit.json that ld-client audit-privacy wrote of this release."),
    out: Path = typer.Option(..., help="The HTML file to write; it names no patient and no file."),
    trust: str = TRUST,
    allow_unsigned: bool = UNSIGNED,
) -> None:
    """Write what the data protection officer reads and signs: one page that needs nothing else."""
    from ld_client.privacy_report.report import write_privacy_report

    console, trusted = Console(), _trusted(release, trust, allow_unsigned)
    with console.status("composing the privacy loss"):
        lines = write_privacy_report(load_site(config), trusted, release, audit, out)
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


@app.command()
def init(
    kit: Path = typer.Argument(..., help="The kit that the study sent."),
    home: Path = typer.Option(..., help="Folder for the study here; it will hold the site's private key."),
    fingerprint: str = typer.Option("", help="The study's fingerprint, as its people said it: SHA256:..."),
) -> None:
    """Join a study: check its kit, make the site's key, write a config to fill in."""
    from ld_client.deployment.join import join

    _say(*join(kit, home, fingerprint))


@app.command()
def enroll(home: Path = HOME) -> None:
    """Print the site's public key, for the study's ld-server admit."""
    from ld_client.deployment.join import enrolment
    from ld_client.deployment.site_home import SiteHome

    site = SiteHome(home.resolve())
    site.kit()  # says what to do where there is none
    print(enrolment(site))


@app.command()
def approve(
    home: Path = HOME,
    yes: bool = typer.Option(False, "--yes", help="Approve without asking."),
    withdraw: bool = typer.Option(False, "--withdraw", help="Take every approval back."),
) -> None:
    """Show what the study would run here and what would leave, and allow it."""
    from ld_client.deployment import approvals
    from ld_client.deployment.site_home import SiteHome

    site = SiteHome(home.resolve())
    if withdraw:
        approvals.withdraw(site)
        return _say("every approval is withdrawn: nothing runs here")
    from ld_client.deployment.approve import describe  # loads torch

    seen = site.kit()
    _say(*describe(site))
    if not yes and not typer.confirm("Approve?"):
        raise ApprovalError("nothing was approved")
    made = approvals.approve(site, seen)
    return _say(f"approved: code {made.bundle[:16]}, study {made.study[:16]}")


@app.command()
def start(home: Path = HOME) -> None:
    """Take part in the study until told to end."""
    from ld_client.deployment.node import run_node
    from ld_client.deployment.site_home import SiteHome

    run_node(SiteHome(home.resolve()))


@app.command()
def pull(
    home: Path = HOME,
    release: str = typer.Option("", help="The release's name; by default the newest."),
    out: Path | None = typer.Option(None, help="Folder to make; by default HOME/releases/NAME."),
) -> None:
    """Fetch a release of the study, check its signature, and open it if it is encrypted to this site."""
    from ld_client.deployment.pull import pull as fetch
    from ld_client.deployment.site_home import SiteHome

    with progress_bar(Console()) as progress:
        lines = fetch(SiteHome(home.resolve()), release, out, progress)
    _say(*lines)


@app.command()
def check(home: Path = HOME) -> None:
    """Say whether this site is ready for its study, and what to mend; exit code 1 when something failed."""
    from ld_client.deployment.check import check_home
    from ld_client.deployment.site_home import SiteHome

    console = Console()
    with console.status("checking"):
        findings = check_home(SiteHome(home.resolve()))
    table = Table("check", "", Column("found", overflow="fold"), Column("remedy", overflow="fold"))
    for one in findings:
        table.add_row(one.name, one.standing.value, Text(one.said), Text(one.remedy))
    console.print(table)
    if any(one.standing == "failed" for one in findings):
        raise typer.Exit(1)


@app.command("dry-run")
def dry_run(home: Path = HOME) -> None:
    """Run the study's first round on the site's own data and show what would leave; nothing is sent or charged."""
    from ld_client.deployment.dry_run import dry_run as rehearse
    from ld_client.deployment.site_home import SiteHome

    with Console().status("training"):
        lines = rehearse(SiteHome(home.resolve()))
    _say(*lines)


@audit_app.command("verify")
def verify(home: Path = HOME) -> None:
    """Check that the audit log is whole: its chain, its signatures, and the heads that the server acknowledged."""
    from ld_client.deployment.audit_verify import verdict_lines, verify_home
    from ld_client.deployment.site_home import SiteHome

    verdict = verify_home(SiteHome(home.resolve()))
    _say(*verdict_lines(verdict))
    if verdict.problems:
        raise DeploymentError(f"the audit log does not hold: {len(verdict.problems)} problems")


@app.command("left-out")
def left_out(config: Path = CONFIG, overrides: list[str] = OVERRIDES) -> None:
    """List every file and table row that the last index run left out, tab-separated: name, files, reason, detail."""
    from ld_client.data.store import read_exclusions

    for one in read_exclusions(load_site(config, overrides or []).store_path):
        print(one.name, one.files, one.reason.value, one.detail, sep="\t")


def show_exclusions(console: Console, entries: Sequence[Exclusion], full_list: str) -> None:
    """Print how often each reason occurs, then the first entries, then the command that prints them all."""
    if not entries:
        return
    reasons = Table("left out because", "entries", "files")
    for reason, count in Counter(one.reason for one in entries).most_common():
        reasons.add_row(reason.value, str(count), str(sum(one.files for one in entries if one.reason == reason)))
    console.print(reasons)
    for one in entries[:SHOWN]:
        console.print(f"  {one.name}: {one.reason.value}: {one.detail}", soft_wrap=True, highlight=False, markup=False)
    if len(entries) > SHOWN:
        console.print(f"  and {len(entries) - SHOWN} more: {full_list}", soft_wrap=True, highlight=False, markup=False)


def _trusted(folder: Path, trust: str, allow_unsigned: bool) -> Release:
    from ld_common.release.trusted_keys import read_trusted_release  # loads torch

    release, notes = read_trusted_release(folder, trust, allow_unsigned)
    _say(*notes)
    return release


def _say(*lines: str) -> None:
    for line in lines:
        Console().print(visible(line), soft_wrap=True, highlight=False, markup=False, emoji=False)


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with an ETA for each stage; yields the function that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance


def main() -> None:
    """The entry point `ld-client`."""
    run_cli(app)


if __name__ == "__main__":
    main()
