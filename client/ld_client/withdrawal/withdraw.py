"""`ld-client withdraw`: removes a patient from the store, logs that, and says which studies trained on the patient.

The patient's identifier is used for three things, and neither written nor printed: for the pseudonym, to see whether
the table has the patient, and to see whether the site's config or audit log names the patient.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ld_client.data.participation import read_participations
from ld_client.data.pseudonyms import pseudonym
from ld_client.data.store_index import INDEX
from ld_client.data.store_key import KEY_FILE, load_key
from ld_client.data.withdrawals import add_withdrawal, read_withdrawals, withdrawn
from ld_client.deployment.audit_log import CONSENT, AuditLog, last_entry
from ld_client.deployment.site_home import SiteHome
from ld_client.privacy.ledger import Ledger
from ld_client.site_config import OWN_PARTS, RESIDUALS, SiteConfig
from ld_client.withdrawal.quarantine import find_series
from ld_client.withdrawal.removal import LOCK, HeldData, Removal, held_data, remove_withdrawn, stored_patients
from ld_client.withdrawal.studies import StudyPart, UnrecordedRounds, part_lines, studies_of, unrecorded_rounds
from ld_common.core.atomic_files import file_digest, held
from ld_common.core.errors import LdError, StoreError

SHORTEST_SEARCHED = 4
"""Characters of the shortest identifier that is searched for in texts: a shorter one is found everywhere."""


@dataclass(frozen=True)
class LeavingPatient:
    """One patient, as far as this site knows the patient."""

    pseudonym: str
    in_store: bool
    in_table: bool
    series: int
    """Series in the store's quarantine."""
    named_in: list[str]
    """Files of the site's home that hold the identifier as text."""


@dataclass(frozen=True)
class WithdrawalReport:
    """What a withdrawal did; it names no patient."""

    newly: bool
    """Whether the withdrawal was not on the list before."""
    patients: int
    """Patients that the studies are about: one, or all on the list."""
    withdrawals: int
    """Patients on the list."""
    removal: Removal
    studies: list[StudyPart]
    unrecorded: list[UnrecordedRounds]
    frozen: list[str] = field(default_factory=list)
    """Digests of the studies whose next round is refused, because they began with this patient's data."""
    in_table: bool = False
    named_in: list[str] = field(default_factory=list)
    logged: bool = False
    """Whether an audit log has an entry of it; a site without a home has no log."""


def find_patient(site: SiteConfig, identifier: str, texts: Sequence[Path] = ()) -> LeavingPatient:
    """The patient of an identifier of the site's table.

    Args:
        site: the site.
        identifier: as the table writes it.
        texts: files of the site that may name the patient.

    Raises:
        StoreError: neither the store, nor the table, nor a record knows the patient.
        LdError: the key, the store or a record cannot be read.
    """
    in_table = _in_table(site, identifier)
    if in_table or (site.store_path / KEY_FILE).exists():
        name = pseudonym(load_key(site.store_path, site.ledger_path), identifier)
        in_store = name in stored_patients(site.store_path)
        records = read_participations(site.ledger_path)
        recorded = name in withdrawn(site.store_path) or any(name in record.pseudonyms for record in records)
        series = len(find_series(site.store_path, load_key(site.store_path), frozenset({name})).withdrawn)
        if in_store or in_table or recorded or series:
            return LeavingPatient(name, in_store, in_table, series, _named_in(identifier, texts))
    raise StoreError(
        "neither the store nor the table has this patient: nothing was changed. Write the identifier as the column "
        f"'{site.data.columns.patient}' of the table has it"
    )


def preview(site: SiteConfig, patient: LeavingPatient) -> HeldData:
    """What the store holds of a patient; raises `StoreError`."""
    return held_data(site.store_path, frozenset({patient.pseudonym}))


def withdraw(
    site: SiteConfig, patient: LeavingPatient | None, home: SiteHome | None, releases: Sequence[Path]
) -> WithdrawalReport:
    """Put a patient on the list of withdrawals and remove all on the list from the store. A second run does no harm.

    Args:
        site: the site.
        patient: who withdraws; None only finishes earlier withdrawals.
        home: the site's home, whose audit log gets an entry.
        releases: folders of releases at this site.

    Raises:
        LdError: a file cannot be read or written. Once the list is written, nothing trains on the patient, whatever
            else failed.
    """
    store = site.store_path
    log = None if home is None else AuditLog.of(home)  # before anything changes
    if patient is None and not store.is_dir():
        raise StoreError(f"there is no store in '{store}': nothing was withdrawn")
    with held(store / LOCK):
        newly = patient is not None and add_withdrawal(store, patient.pseudonym, patient.in_store)
        removal = remove_withdrawn(store)
        removal.deleted += _remove_kept_tensors(site)
        count = len(read_withdrawals(store))
        logged = log is not None and _log(log, store, count, removal)
    gone = withdrawn(store) if patient is None else frozenset({patient.pseudonym})
    studies = studies_of(site, gone, releases)
    frozen = {entry.study_digest for entry in Ledger(site.ledger_path).cohorts()}
    return WithdrawalReport(
        newly=newly,
        patients=len(gone),
        withdrawals=count,
        removal=removal,
        studies=studies,
        unrecorded=unrecorded_rounds(site),
        frozen=[part.study_digest for part in studies if part.in_last_data and part.study_digest in frozen],
        in_table=patient is not None and patient.in_table,
        named_in=[] if patient is None else patient.named_in,
        logged=logged,
    )


def _remove_kept_tensors(site: SiteConfig) -> list[str]:
    """Delete rounding errors and own factors, which all the site's patients made; returns what was deleted."""
    deleted = []
    for folder in [site.ledger_path.parent / kind for kind in (RESIDUALS, OWN_PARTS)]:
        if not folder.exists():
            continue
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise StoreError(
                f"cannot delete '{folder}' ({error}): delete it, then run ld-client withdraw --finish"
            ) from error
        deleted.append(folder.name)
    return deleted


def report_lines(report: WithdrawalReport, site: SiteConfig) -> list[str]:
    """The report as text."""
    removal, held_before = report.removal, report.removal.held
    so_far = "1 patient has" if report.withdrawals == 1 else f"{report.withdrawals} patients have"
    lines = [
        f"withdrawn; {so_far} withdrawn from this store so far"
        if report.newly
        else f"nobody new: {so_far} withdrawn from this store",
        f"removed: {held_before.visits} visits, {held_before.pairs} ordered pairs of visits, {removal.series} series "
        f"of the quarantine; name and detail of {held_before.exclusions} exclusions, as any may be the patient's",
        f"files written anew: {', '.join(removal.written) or 'none'}; deleted: {', '.join(removal.deleted) or 'none'}",
        *(part_lines(report.studies, report.unrecorded, report.patients) if report.patients else []),
    ]
    if report.withdrawals:
        logged = "the audit log has an entry with counts and no name"
        lines.append(logged if report.logged else "nothing was logged: a site has an audit log in its --home only")
    lines += [f"to do: {line}" for line in _remaining(report, site)]
    if report.studies or report.unrecorded:
        lines.append("ld-client forget --retrain-plan --withdrawn states what exact removal from the releases costs")
    return lines


def _remaining(report: WithdrawalReport, site: SiteConfig) -> list[str]:
    """What this software leaves to people."""
    lines = [
        f"study {digest[:16]} began with this patient, so its next round is refused. ld-client cohort --renew "
        f"{digest[:16]} lets it go on without; the server can then compare rounds before and after"
        for digest in report.frozen
    ]
    if report.in_table:
        lines.append(
            f"the table '{Path(site.data.table).name}' has rows of this patient, and data.root may hold scans: every "
            "index passes over them, and your archive's rules say whether they may stay"
        )
    lines += [f"'{name}' holds the patient's identifier" for name in report.named_in]
    for what, names in (
        ("files of the store that this version does not know", report.removal.unknown),
        ("series of the quarantine that do not say of whom they are", report.removal.unreadable_series),
    ):
        lines += [f"look at {what}: {', '.join(names)}"] if names else []
    return [*lines, "remove what lies elsewhere: backups of the store, what fetch --out wrote, audit.json files"]


def _log(log: AuditLog, store: Path, count: int, removal: Removal) -> bool:
    """Log a withdrawal, unless the log has it and nothing was removed since; returns whether the log has it."""
    last = last_entry(log.path, {CONSENT})
    behind = count > (0 if last is None else int(last.details["withdrawals"]))
    if behind or removal.written or removal.series:
        log.append(
            CONSENT,
            {
                "withdrawals": count,
                "visits": removal.held.visits,
                "pairs": removal.held.pairs,
                "exclusions": removal.held.exclusions,
                "series": removal.series,
                "files_written": len(removal.written),
                "files_deleted": len(removal.deleted),
                "store": file_digest(store / INDEX) if (store / INDEX).exists() else None,
            },
        )
    return count > 0


def _in_table(site: SiteConfig, identifier: str) -> bool:
    """Whether a row of the table is the patient's; a table that cannot be read has none."""
    from ld_client.data.table_reading import read_table

    try:
        return identifier in read_table(site.data).rows_by_patient
    except LdError:
        return False


def _named_in(identifier: str, texts: Sequence[Path]) -> list[str]:
    if len(identifier) < SHORTEST_SEARCHED:
        return []
    return [str(path) for path in texts if path.is_file() and identifier.encode() in path.read_bytes()]
