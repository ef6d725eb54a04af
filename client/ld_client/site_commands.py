"""Commands of `ld-client` that need the site's config only: index, exclusions, drift, budget, audit, privacy report,
page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ld_client.data.exclusions import Exclusion, read_exclusions
from ld_client.data_config import Contradiction
from ld_client.deployment.site_home import SiteHome
from ld_client.site_config import SiteConfig, load_site
from ld_common.core.command import (
    HOST_HELP,
    TRUST_HELP,
    UNSIGNED_HELP,
    Json,
    grouped,
    print_json,
    print_lines,
    printable,
    stage_bars,
)
from ld_common.core.config import require
from ld_common.core.errors import ConfigError, StoreError
from ld_common.diffusion.options import ESTIMATORS
from ld_common.protocol.enrollment_kit import MANIFEST

if TYPE_CHECKING:
    from ld_client.data.contradictions import Doubt
    from ld_common.protocol.study_config import StudyConfig
    from ld_common.release.release import Release

SHOWN = 20
"""Exclusions that `index` lists."""
SEARCHES = (*ESTIMATORS, "counterfactual")
OVERRIDES = typer.Argument(None, metavar="[KEY=VALUE]...", help="Replace values of the site's YAML file.")
STUDY_OVERRIDES = typer.Argument(None, metavar="[KEY=VALUE]...", help="Replace values of the study.")


@dataclass(frozen=True)
class SiteOptions:
    """Which site: exactly one of the two."""

    home: Annotated[
        Path | None, typer.Option("--home", help="The study's folder here, made by ld-client init. Or give --config.")
    ] = None
    config: Annotated[
        Path | None, typer.Option("--config", help="The site's YAML file, for a site without a home.")
    ] = None

    def load(self, overrides: Sequence[str] | None = None) -> SiteConfig:
        """The site's config; raises `ConfigError` unless exactly one option is given."""
        require((self.home is None) != (self.config is None), "give --home HOME or --config FILE, exactly one of them")
        if self.config is not None:
            return load_site(self.config, overrides or ())
        home = self.site_home
        site = home.site()
        return load_site(home.config_file, overrides) if overrides else site

    @property
    def site_home(self) -> SiteHome:
        """The home; raises `ConfigError` where `--config` was given."""
        if self.home is None:
            raise ConfigError("give --home HOME")
        return SiteHome(self.home.resolve())

    def study(self, study_file: Path | None, overrides: Sequence[str] | None) -> StudyConfig | None:
        """The study of a file, or else of the home's kit; None without either."""
        from ld_common.protocol.study_config import load_study

        if study_file is not None:
            return load_study(study_file, list(overrides or ()))[0]
        if self.home is None:
            return None
        home = self.site_home
        home.study()  # limits this process to the study's own packages
        return load_study(home.study_file, list(overrides or ()))[0]

    def arguments(self) -> str:
        """The options as they were typed."""
        return f"--config {self.config}" if self.home is None else f"--home {self.home}"


@dataclass(frozen=True)
class SiteReleaseOptions:
    """Which release, and who may have signed it."""

    release: Annotated[Path, typer.Option("--release", help="Folder of a release that this site took part in.")]
    trust: Annotated[str, typer.Option("--trust", help=f"{TRUST_HELP} With --home, the study's by default.")] = ""
    allow_unsigned: Annotated[bool, typer.Option("--allow-unsigned", help=UNSIGNED_HELP)] = False

    def load(self, site: SiteOptions, quiet: bool = False) -> Release:
        """The release, checked; raises `SignatureError` or `ReleaseError`."""
        return _load_release(self.release, self.trust, self.allow_unsigned, site, quiet)


@dataclass(frozen=True)
class DriftOptions:
    """How a drift is estimated."""

    estimator: Annotated[
        str, typer.Option("--estimator", help="moments, grid or counterfactual; the study's by default.")
    ] = ""
    release: Annotated[
        Path | None, typer.Option("--release", help="Search with this release's adapter, not with the plain base.")
    ] = None
    trust: Annotated[str, typer.Option("--trust", help=TRUST_HELP)] = ""
    allow_unsigned: Annotated[bool, typer.Option("--allow-unsigned", help=UNSIGNED_HELP)] = False

    def __post_init__(self) -> None:
        known = self.estimator in ("", *SEARCHES)
        require(known, f"--estimator is '{self.estimator}': use {', '.join(SEARCHES)}")


@dataclass(frozen=True)
class AttackSizes:
    """How much an audit looks at."""

    points: Annotated[int, typer.Option("--points", min=1, help="Timesteps and noises at each scan's loss.")] = 32
    generated: Annotated[int, typer.Option("--generated", min=1, help="Images that are searched for copies.")] = 200
    canaries: Annotated[
        int, typer.Option("--canaries", min=0, help="Most patients in the rehearsal's coin toss; 0 for no rehearsal.")
    ] = 1000


@grouped
def index(
    site: SiteOptions,
    accept: Annotated[
        list[str] | None,
        typer.Option("--accept", help=f"Keep visits with this kind of contradiction: {', '.join(Contradiction)}."),
    ] = None,
    anew: Annotated[
        bool, typer.Option("--anew", help="Read every file again, also those that have not changed since the last run.")
    ] = False,
    as_json: Json = False,
    overrides: list[str] = OVERRIDES,
) -> None:
    """Read the site's scans and table and cache what training needs; files that did not change are not read again."""
    config = site.load([*(overrides or ()), *([f"data.accept=[{','.join(accept)}]"] if accept else ())])
    from ld_client.data.faces import REMEDY
    from ld_client.data.indexing import build_store

    console = Console(stderr=as_json)
    with stage_bars(console) as progress:
        summary = build_store(config, progress, anew)
    if as_json:
        counts = {**asdict(summary), "exclusions": len(summary.exclusions), "store": config.store}
        print_json(counts)
    else:
        table = Table("patients", "to train on", "held out", "visits", "pairs", "excluded", title=f"{config.site}")
        split = summary.split
        row = (summary.patients, split.trained, split.held_out, summary.visits, summary.pairs, len(summary.exclusions))
        table.add_row(*map(str, row))
        console.print(table)
        if summary.unchanged:
            print_lines(f"{summary.unchanged} of the visits are as in the last index; --anew reads their scans again")
        _show_exclusions(console, summary.exclusions, f"ld-client exclusions {site.arguments()}")
        _show_doubts(summary.doubts, summary.accepted)
        if summary.faces.faces:
            print_lines(f"{summary.faces}: {REMEDY}")
    if not summary.visits:
        raise StoreError("no visit could be used: the exclusions have the reasons")
    if not as_json:
        print_lines(f"wrote {config.store}")


@grouped
def exclusions(site: SiteOptions, as_json: Json = False, overrides: list[str] = OVERRIDES) -> None:
    """List the files and table rows that the last index excluded, tab-separated: name, files, reason, detail."""
    entries = read_exclusions(site.load(overrides).store_path)
    if as_json:
        return print_json([asdict(entry) for entry in entries])
    if not entries:
        return print_lines("nothing was excluded")
    for entry in entries:
        # a file may have a tab or a line break in its name
        cells = (entry.name, str(entry.files), entry.reason.value, entry.detail)
        print(*(printable(cell.replace("\t", "\\t")) for cell in cells), sep="\t")
    return None


@grouped
def drift(
    site: SiteOptions,
    options: DriftOptions,
    study: Path | None = typer.Option(None, help="The study's YAML file; with --home, the kit's study by default."),
    as_json: Json = False,
    overrides: list[str] = STUDY_OVERRIDES,
) -> None:
    """Show the drift that a study would give this site, and the loss of each δ of a search."""
    config = site.load()
    study_config = site.study(study, overrides)
    if study_config is None:
        raise ConfigError("give --study FILE, or --home HOME for the study of its kit")
    from ld_client.drift_report import report_drift

    release = None
    if options.release is not None:
        release = _load_release(options.release, options.trust, options.allow_unsigned, site, as_json)
    console = Console(stderr=as_json)
    with stage_bars(console) as progress:
        report = report_drift(
            config, study_config, options.estimator or study_config.drift.estimator, release, progress
        )
    if as_json:
        return print_json(report)
    for part in report.renderables():
        console.print(part, soft_wrap=True)
    return None


@grouped
def budget(
    site: SiteOptions,
    study: Path | None = typer.Option(None, help="Also show the cost of this study, a YAML file."),
    as_json: Json = False,
    overrides: list[str] = STUDY_OVERRIDES,
) -> None:
    """Show what the privacy budget was spent on, what is left, and what a study would cost (with --home, the kit's)."""
    config = site.load()
    study_config = site.study(study, overrides)
    from ld_client.privacy.budget import read_budget

    with Console(stderr=True).status("composing the privacy loss"):
        report = read_budget(config, study_config)
    if as_json:
        return print_json(report)
    return print_lines(*report.lines())


@grouped
def cohort(
    site: SiteOptions,
    renew: str = typer.Option("", help="Digest of the study that may train on changed data; its first digits suffice."),
    as_json: Json = False,
) -> None:
    """List the studies whose data are frozen since their first round; --renew lets one go on with changed data."""
    config = site.load()
    from ld_client.deployment.cohort import renew_cohort
    from ld_client.privacy.ledger import Ledger

    ledger = Ledger(config.ledger_path)
    if renew:
        home = None if site.home is None else site.site_home
        return print_lines(*renew_cohort(ledger, renew, home))
    frozen = ledger.cohorts()
    if as_json:
        return print_json([asdict(entry) for entry in frozen])
    return print_lines(*(f"{entry.study_digest[:16]}  {entry.study}, since {entry.time}" for entry in frozen))


@grouped
def audit_privacy(
    site: SiteOptions,
    release: SiteReleaseOptions,
    sizes: AttackSizes,
    out: Path = typer.Option(..., help="Folder for audit.json, which points to scans and must stay at the site."),
    as_json: Json = False,
) -> None:
    """Attack a release with this site's own patients: membership, copies, an empirical lower bound on ε."""
    config = site.load()
    from ld_client.audit.command import AUDIT, audit_lines, run_audit
    from ld_client.audit.run import AuditOptions

    checked = release.load(site, as_json)
    with stage_bars(Console(stderr=as_json)) as progress:
        audit = run_audit(config, checked, out, AuditOptions(**vars(sizes)), progress)
    if as_json:
        return print_json(audit.to_mapping())
    return print_lines(*audit_lines(audit), f"wrote {out / AUDIT}, which points to scans: keep it at the site")


@grouped
def privacy_report(
    site: SiteOptions,
    release: SiteReleaseOptions,
    audit: Path | None = typer.Option(None, help="audit.json of this release, written by ld-client audit-privacy."),
    out: Path = typer.Option(..., help="HTML file to write; it names no patient and no file."),
    as_json: Json = False,
) -> None:
    """Write the report that the data protection officer reads and signs, as one HTML page."""
    config = site.load()
    from ld_client.privacy_report.report import report_lines, write_privacy_report

    checked = release.load(site, as_json)
    with Console(stderr=True).status("composing the privacy loss"):
        facts = write_privacy_report(config, checked, release.release, audit, out)
    if as_json:
        return print_json(facts.to_mapping())
    return print_lines(*report_lines(facts, out))


@grouped
def page(
    site: SiteOptions,
    host: str = typer.Option("127.0.0.1", help=HOST_HELP),
    port: int = typer.Option(7871, min=1, max=65535, help="Port to listen on."),
) -> None:
    """Serve a read-only page of this site: rounds, privacy budget, what left, refusals, exclusions by reason.

    Example: ld-client page --home HOME
    """
    config = site.load()
    from ld_client.site_page import SitePage
    from ld_common.page.serve import serve_page

    shown = SitePage(config, None if site.home is None else site.site_home)
    serve_page(shown.render, host, port, "ld-client page", "this hospital's records")


def add_site_commands(app: typer.Typer) -> None:
    """Add the commands of this module to an app."""
    app.command("index")(index)
    app.command("exclusions")(exclusions)
    app.command("drift")(drift)
    app.command("budget")(budget)
    app.command("cohort")(cohort)
    app.command("audit-privacy")(audit_privacy)
    app.command("privacy-report")(privacy_report)
    app.command("page")(page)


def _show_exclusions(console: Console, entries: Sequence[Exclusion], command: str) -> None:
    """Print the number of each reason, the first entries, and the command that lists all."""
    if not entries:
        return
    table = Table("excluded because", "entries", "files")
    for reason, count in Counter(entry.reason for entry in entries).most_common():
        table.add_row(reason.value, str(count), str(sum(entry.files for entry in entries if entry.reason == reason)))
    console.print(table)
    print_lines(*(f"  {entry.name}: {entry.reason.value}: {entry.detail}" for entry in entries[:SHOWN]))
    if len(entries) > SHOWN:
        print_lines(f"  and {len(entries) - SHOWN} more: {command}")


def _show_doubts(doubts: Sequence[Doubt], accepted: Mapping[str, int]) -> None:
    """Print the number and the first of each kind of doubt, and what the site accepts."""
    first = {doubt.kind: doubt for doubt in reversed(doubts)}
    for kind, count in Counter(doubt.kind for doubt in doubts).most_common():
        print_lines(f"KEPT, BUT LOOK: {kind}: {count}, such as {first[kind].name}: {first[kind].detail}")
    if accepted:
        print_lines(f"kept because data.accept says so: {', '.join(f'{kind} {n}' for kind, n in accepted.items())}")


def _load_release(folder: Path, trust: str, allow_unsigned: bool, site: SiteOptions, quiet: bool) -> Release:
    from ld_common.release.trusted_keys import read_trusted_release

    if not trust and not allow_unsigned and site.home is not None:
        trust = str(site.site_home.kit_folder / MANIFEST)
    release, notes = read_trusted_release(folder, trust, allow_unsigned)
    if not quiet:
        print_lines(*notes)
    return release
