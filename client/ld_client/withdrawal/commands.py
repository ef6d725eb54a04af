"""Commands of `ld-client` for a patient who withdraws consent: withdraw, forget."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from ld_client.site_commands import SiteOptions
from ld_common.core.command import Json, grouped, print_json, print_lines
from ld_common.core.config import require
from ld_common.core.errors import ConfigError

PATIENT = typer.Argument(
    "", help="The patient as the table writes it; - reads it from standard input, so that no shell keeps it."
)


@dataclass(frozen=True)
class ReleaseFolders:
    """Where releases lie."""

    release: Annotated[
        list[Path] | None,
        typer.Option("--release", help="Folder of a release at this site; with --home, those pulled are known."),
    ] = None

    def at(self, site: SiteOptions) -> list[Path]:
        """All folders, each once."""
        pulled = [] if site.home is None else sorted((site.site_home.path / "releases").glob("*/"))
        return list(dict.fromkeys([*pulled, *(path.resolve() for path in self.release or ())]))


@grouped
def withdraw(
    site: SiteOptions,
    releases: ReleaseFolders,
    patient: str = PATIENT,
    finish: bool = typer.Option(False, "--finish", help="Finish withdrawals that stopped, or clean a restored store."),
    yes: bool = typer.Option(False, "--yes", help="Do not ask."),
    as_json: Json = False,
) -> None:
    """Remove a patient who withdraws consent: from store, caches and exclusions, now and in every later index.

    The site keeps the patient's pseudonym: to pass over the scans, and to know which studies trained on them.
    """
    require(bool(patient) != finish, "give the patient, or --finish, exactly one of them")
    config = site.load()
    from ld_client.withdrawal import withdraw as withdrawing

    known = None
    if not finish:
        home_texts = [] if site.home is None else [site.site_home.config_file, site.site_home.audit_log]
        texts = home_texts if site.config is None else [site.config]
        known = withdrawing.find_patient(config, _identifier(patient), texts)
        found = withdrawing.preview(config, known)
        question = (
            f"{found.visits} visits, {found.pairs} pairs of visits and {known.series} fetched series of this patient, "
            f"and the names of {found.exclusions} exclusions, leave the store; this cannot be undone. Withdraw?"
        )
        if not yes and not typer.confirm(question, err=True):
            raise ConfigError("nothing was changed")
    home = None if site.home is None else site.site_home
    report = withdrawing.withdraw(config, known, home, releases.at(site))
    if as_json:
        return print_json(asdict(report))
    return print_lines(*withdrawing.report_lines(report, config))


@grouped
def forget(
    site: SiteOptions,
    releases: ReleaseFolders,
    patient: str = PATIENT,
    withdrawn: bool = typer.Option(False, "--withdrawn", help="All patients who withdrew consent."),
    retrain_plan: bool = typer.Option(False, "--retrain-plan", help="State the cost; the only thing that it does."),
    as_json: Json = False,
) -> None:
    """State what it would cost to train again without a patient: rounds, steps, hours, releases. It starts nothing."""
    require(retrain_plan, "give --retrain-plan: this command only states a cost; ld-client withdraw removes a patient")
    require(bool(patient) != withdrawn, "give the patient, or --withdrawn, exactly one of them")
    config = site.load()
    from ld_client.data import withdrawals
    from ld_client.withdrawal import retrain_plan as planning
    from ld_client.withdrawal.withdraw import find_patient

    if withdrawn:
        names = withdrawals.withdrawn(config.store_path)
        if not names:
            return print_json(None) if as_json else print_lines("no patient of this store has withdrawn consent")
    else:
        names = frozenset({find_patient(config, _identifier(patient)).pseudonym})
    log = None if site.home is None else site.site_home.audit_log
    plan = planning.plan_retraining(config, names, releases.at(site), log)
    return print_json(asdict(plan)) if as_json else print_lines(*planning.plan_lines(plan))


def add_withdrawal_commands(app: typer.Typer) -> None:
    """Add the commands of this module to an app."""
    app.command("withdraw")(withdraw)
    app.command("forget")(forget)


def _identifier(patient: str) -> str:
    """The identifier without blanks around it, as the table is read; raises `ConfigError` for none."""
    identifier = (sys.stdin.readline() if patient == "-" else patient).strip()
    require(bool(identifier), "the patient is empty: give the identifier of the table")
    return identifier
