"""`ld-client`: what a hospital's data manager runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

import ld_common.offline  # noqa: F401  (before any model library)
from ld_client.left_out import LeftOut
from ld_client.site import load_site
from ld_common.command import run_cli
from ld_common.errors import StoreError

SHOWN = 20
CONFIG = typer.Option(..., "--config", help="The site's YAML file.")
OVERRIDES = typer.Argument(None, metavar="[KEY=VALUE]...", help="Replace values of the YAML file.")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def describe() -> None:
    """A hospital's side of a federation. Nothing here sends anything anywhere."""


@app.command()
def index(config: Path = CONFIG, overrides: list[str] = OVERRIDES) -> None:
    """Read the site's scans and table and cache what training needs."""
    from ld_client.store import build_store  # torch and diffusers take seconds to import; --help needs neither

    site = load_site(config, overrides or [])
    console = Console()
    with progress_bar(console) as progress:
        summary = build_store(site, progress)
    counts = Table("patients", "visits", "pairs", "left out", title=f"Store of {site.site}")
    counts.add_row(*map(str, (summary.patients, summary.visits, summary.pairs, len(summary.left_out))))
    console.print(counts)
    show_left_out(console, summary.left_out, f"ld-client left-out --config {config}")
    console.print(f"wrote {site.store}", soft_wrap=True, highlight=False)
    if not summary.visits:
        raise StoreError("no visit could be used: see the reasons above")


@app.command()
def drift(
    config: Path = CONFIG,
    study: Path = typer.Option(..., help="The study's YAML file."),
    choice: str = typer.Option("", help="moments, grid or counterfactual; by default the study's."),
    release: Path | None = typer.Option(None, help="Try with this release's adapter, not the plain base."),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Replace values of the study."),
) -> None:
    """Show the drift that a study would give this site, and the loss of each δ where it searches for one."""
    from ld_client.drift_report import show_drift

    with progress_bar(Console()) as progress:
        lines = show_drift(load_site(config), study, choice, release, overrides or [], progress)
    for line in lines:
        Console().print(line, soft_wrap=True)


@app.command()
def budget(
    config: Path = CONFIG,
    study: Path | None = typer.Option(None, help="Say what this study would cost: its YAML file."),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Replace values of the study."),
) -> None:
    """Show what the data set's privacy was spent on, what is left, and what a study would cost."""
    from ld_client.budget import budget_lines

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
    canaries: int = typer.Option(100, help="Made-up patients of a rehearsal of the study; 0 leaves it out."),
) -> None:
    """Attack a release with this site's own patients: membership, copies, an empirical lower bound on ε."""
    from ld_client.audit.command import run_audit
    from ld_client.audit.run import AuditOptions

    console = Console()
    with progress_bar(console) as progress:
        lines = run_audit(load_site(config), release, out, AuditOptions(points, generated, canaries), progress)
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


@app.command("privacy-report")
def privacy_report(
    config: Path = CONFIG,
    release: Path = typer.Option(..., help="Folder of a release that this site took part in."),
    audit: Path | None = typer.Option(None, help="The audit.json that ld-client audit-privacy wrote of this release."),
    out: Path = typer.Option(..., help="The HTML file to write; it names no patient and no file."),
) -> None:
    """Write what the data protection officer reads and signs: one page that needs nothing else."""
    from ld_client.privacy_report import write_privacy_report

    console = Console()
    with console.status("composing the privacy loss"):
        lines = write_privacy_report(load_site(config), release, audit, out)
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


@app.command("left-out")
def left_out(config: Path = CONFIG, overrides: list[str] = OVERRIDES) -> None:
    """List every file and table row that the last index run left out, tab-separated: name, files, reason, detail."""
    from ld_client.store import read_left_out

    for one in read_left_out(load_site(config, overrides or []).store_path):
        print(one.name, one.files, one.reason.value, one.detail, sep="\t")


def show_left_out(console: Console, entries: Sequence[LeftOut], full_list: str) -> None:
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
