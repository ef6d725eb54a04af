"""BIDS: `sub-X[/ses-Y]/anat/*_T1w.nii.gz` with participants.tsv, and sessions.tsv and scans.tsv where they are."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from ld_client.layouts.base import LayoutImport
from ld_client.layouts.dates import date_of
from ld_client.layouts.entries import Cause, Conflict, LayoutVisit
from ld_client.layouts.tables import LayoutRow, LayoutTable, find_header
from ld_common.core.errors import TableError
from ld_common.imaging.modality import AGE

SCAN = re.compile(
    r"sub-(?P<patient>[^/_]+)(?:/ses-(?P<session>[^/_]+))?/(?P<kind>[a-z]+)/(?P<name>[^/]+\.nii(?:\.gz)?)"
)
ENTITIES = re.compile(r"sub-([^/_]+)(?:_ses-([^/_]+))?_.+")
SESSION_DAY = re.compile(r"d(?:ay)?0*(\d+)", re.IGNORECASE)
"""A session label that counts days, such as d0129."""
PARTICIPANTS, SESSIONS, SCANS = "participants.tsv", "sessions.tsv", "scans.tsv"
DERIVED = ("derivatives/", "sourcedata/", "code/", "stimuli/")
SESSION_COLUMNS = ("session_id", "session", "ses")


@dataclass
class _BidsTables:
    """The rows of a data set's tables."""

    rows: dict[str, dict[tuple[str, str], LayoutRow]] = field(default_factory=dict)
    """Kind of table -> participant and session -> row; the session is "" where a row stands for all."""
    dates: dict[str, str] = field(default_factory=dict)
    """Path of a scan -> acq_time of scans.tsv."""
    unclear: set[str] = field(default_factory=set)
    """Participants with rows that disagree."""
    used: set[tuple[str, str, str]] = field(default_factory=set)


def import_bids(run: LayoutImport) -> None:
    """Add the scans of a BIDS data set."""
    run.use_series("*_T1w.nii", "*_T1w.nii.gz")
    headers, files = _headers(run)
    run.find_attributes(headers)
    _read_levels(run)
    tables = _read_tables(run, files)
    scans = [name for name in run.files if name.lower().endswith((".nii", ".nii.gz"))]
    for name in run.each("scans", scans):
        _add_scan(run, name, tables)
    _leave_out_rows(run, tables)
    run.state(
        "date: acq_time of scans.tsv, or else of sessions.tsv, or else the days in the session's label (ses-d0129)"
    )
    run.unnamed = (Cause.NOT_SELECTED, "only NIfTI is read of a BIDS data set")


def _headers(run: LayoutImport) -> tuple[dict[str, list[str]], dict[str, list[LayoutTable]]]:
    """The columns of each kind of table, and the tables."""
    files: dict[str, list[LayoutTable]] = {SESSIONS: [], PARTICIPANTS: [], SCANS: []}
    for name in run.files:
        path = PurePosixPath(name)
        kind = next((kind for kind in files if name == kind or re.fullmatch(rf"sub-.+_{kind}", path.name)), None)
        if kind is not None and not name.startswith(DERIVED):
            files[kind].append(find_header(run.root / name))
    for table in map(find_header, run.options.tables):
        if not table.has(["participant_id"]):
            raise TableError(f"--table '{table.path}' has no column participant_id, by which it is joined")
        files.setdefault(table.name, []).append(table)
    headers = {
        kind: [column for table in found for column in table.header] for kind, found in files.items() if kind != SCANS
    }
    return headers, files


def _read_levels(run: LayoutImport) -> None:
    """Take the words and check the units that participants.json describes."""
    path = run.root / "participants.json"
    if not path.is_file():
        return
    try:
        described: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TableError(f"'{path}' is not JSON: {error}") from error
    run.explain(["participants.json"])
    for attribute, sources in run.sources.items():
        for _, column in sources:
            entry = described.get(column) if isinstance(described, dict) else None
            if not isinstance(entry, dict):
                continue
            units = str(entry.get("Units", "years")).lower()
            if attribute == AGE and not units.startswith("y"):
                raise TableError(
                    f"'{path}' gives ages in '{units}': only years are read; convert the column '{column}'"
                )
            levels = entry.get("Levels")
            if isinstance(levels, dict):
                words = {str(word).lower(): _level_word(text) for word, text in levels.items()}
                run.vocabulary.setdefault(attribute, {}).update(words)


def _level_word(text: object) -> str:
    """The word of a level, which newer versions of BIDS describe by an object."""
    return str(text.get("Description", "") if isinstance(text, dict) else text).strip()


def _read_tables(run: LayoutImport, files: Mapping[str, list[LayoutTable]]) -> _BidsTables:
    tables = _BidsTables(rows={kind: {} for kind in files if kind != SCANS})
    for kind, found in files.items():
        for table in found:
            if kind == SCANS:
                folder = PurePosixPath(table.path.parent.relative_to(run.root).as_posix())
                for row in run.read(table, kind, "filename", "acq_time"):
                    tables.dates[(folder / row.get("filename")).as_posix()] = row.get("acq_time")
                continue
            of_file = table.name.removeprefix("sub-").removesuffix(f"_{kind}") if kind == SESSIONS else ""
            for row in run.read(table, kind, "participant_id", "acq_time", *SESSION_COLUMNS):
                patient = of_file or row.get("participant_id").removeprefix("sub-")
                _add_row(run, tables, table, (kind, patient, _session(row)), row)
    return tables


def _add_row(
    run: LayoutImport, tables: _BidsTables, table: LayoutTable, key: tuple[str, str, str], row: LayoutRow
) -> None:
    """Keep a row; of two equal ones the first counts, of two that disagree neither."""
    kind, patient, session = key
    earlier = tables.rows[kind].setdefault((patient, session), row)
    if earlier is row:
        return
    same = earlier.cells == row.cells
    detail = f"as row {earlier.number}" if same else f"row {earlier.number}, of the same participant, disagrees"
    run.leave_out(f"{table.name} row {row.number}", Cause.DUPLICATE if same else Cause.CONFLICT, detail, rows=1)
    if not same:
        tables.unclear.add(patient)


def _session(row: LayoutRow) -> str:
    return next((cell for column in SESSION_COLUMNS if (cell := row.get(column))), "").removeprefix("ses-")


def _add_scan(run: LayoutImport, name: str, tables: _BidsTables) -> None:
    match = SCAN.fullmatch(name)
    if name.startswith(DERIVED):
        return run.leave_out(name, Cause.DERIVATIVE, "not under sub-*")
    if match is None:
        return run.leave_out(name, Cause.NOT_IN_LAYOUT, "not sub-X[/ses-Y]/anat/*.nii.gz")
    if run.tier(name) is None or (match["kind"] != "anat" and not run.options.series):
        return run.leave_out(name, Cause.NOT_SELECTED, "")
    patient, session = match["patient"], match["session"] or ""
    entities = ENTITIES.fullmatch(match["name"])
    if entities is None or (entities[1], entities[2] or "") != (patient, session):
        run.contradict(Conflict.NAMES, f"sub-{patient}", name)
        return run.leave_out(name, Cause.CONFLICT, "folder and file name another participant or session")
    if patient in tables.unclear:
        return run.leave_out(name, Cause.CONFLICT, f"two rows of sub-{patient} in one table disagree")
    return _add_visit(run, name, patient, session, tables)


def _add_visit(run: LayoutImport, name: str, patient: str, session: str, tables: _BidsTables) -> None:
    rows: dict[str, LayoutRow] = {}
    for kind, found in tables.rows.items():
        key = next((key for key in ((patient, session), (patient, "")) if key in found), None)
        if key is not None:
            rows[kind] = found[key]
            tables.used.add((kind, *key))
    if not rows and run.sources:
        return run.leave_out(name, Cause.NO_ROW, f"no row of sub-{patient} in {PARTICIPANTS} or {SESSIONS}")
    values = run.attributes(name, f"sub-{patient}", rows, {})
    if values is None:
        return None
    visit = LayoutVisit(f"sub-{patient}", name, values, label=session, age_of_patient=False)
    for kind, column in run.sources.get(AGE, ()):
        if kind in rows and rows[kind].get(column):
            # a row of a session has the age at it, a row of a participant one age for all
            visit.age_of_patient = (patient, session) not in tables.rows[kind] or not session
            break
    _date(run, visit, session, rows, tables)
    return run.add(visit)


def _date(
    run: LayoutImport, visit: LayoutVisit, session: str, rows: Mapping[str, LayoutRow], tables: _BidsTables
) -> None:
    """Set a visit's date or day, and its place among the sessions."""
    of_scan = date_of(tables.dates.get(visit.file, ""), run.options.date_format)
    of_session = date_of(rows[SESSIONS].get("acq_time"), run.options.date_format) if SESSIONS in rows else None
    if of_scan and of_session and abs((of_scan - of_session).days) > 1:
        run.contradict(Conflict.DATES, visit.patient, f"{visit.file}: {of_scan} and {of_session}")
    visit.date = of_scan or of_session
    days = SESSION_DAY.fullmatch(session)
    if visit.date is None and days:
        visit.day = int(days[1])
    visit.order = int(number[0]) if (number := re.search(r"\d+", session)) else (0 if not session else None)


def check_session_order(run: LayoutImport) -> None:
    """Note participants whose numbered sessions do not follow one another in time."""
    dated: dict[str, set[tuple[int, datetime.date]]] = {}
    for visit in run.visits:
        if visit.order is not None and visit.date is not None:
            dated.setdefault(visit.patient, set()).add((visit.order, visit.date))
    for patient, sessions in dated.items():
        dates = [date for _, date in sorted(sessions)]
        if dates != sorted(dates):
            run.contradict(Conflict.SESSION_ORDER, patient, " > ".join(map(str, dates)))


def _leave_out_rows(run: LayoutImport, tables: _BidsTables) -> None:
    check_session_order(run)
    for kind, found in tables.rows.items():
        for (patient, session), row in found.items():
            if (kind, patient, session) not in tables.used:
                name = f"sub-{patient}_{kind} row {row.number}" if kind == SESSIONS else f"{kind} row {row.number}"
                run.leave_out(name, Cause.NO_SCAN, f"of sub-{patient}" + f" ses-{session}" * bool(session), rows=1)
    present = set(run.files)
    for name in tables.dates:
        if name not in present and run.tier(name) is not None:
            run.leave_out(f"{SCANS}: {name}", Cause.NO_FILE, "a row names it", rows=1)
