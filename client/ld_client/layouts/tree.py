"""Plain folders: DICOM matched by its headers, or files whose path names patient and date (`--pattern`)."""

from __future__ import annotations

import datetime
import posixpath
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from ld_client.layouts.base import IMAGES, LayoutImport
from ld_client.layouts.dates import date_of, day_of
from ld_client.layouts.entries import Cause, LayoutVisit
from ld_client.layouts.joins import DatedRow, nearest_row
from ld_client.layouts.tables import LayoutRow, LayoutTable, find_header
from ld_common.core.config import require
from ld_common.core.errors import TableError

if TYPE_CHECKING:
    from ld_common.imaging.dicom_header import DicomHeader

COLUMNS = {
    "patient": ("patient", "patient_id", "patientid", "subject", "subject_id", "participant_id", "ptid"),
    "date": ("date", "visit_date", "scan_date", "study_date", "exam_date", "examdate", "acq_time"),
    "day": ("day", "days", "days_to_visit", "days_from_entry"),
}
"""Names of a table's columns; --column patient=NAME names another."""
DICOM = (".dcm", ".ima")
PLACES = {"patient": r"(?P<patient>[^/]+)", "date": r"(?P<date>[^/]+)", "day": r"(?P<day>[^/]+)"}


@dataclass
class _TreeTables:
    """Rows by patient: those of a visit, with its date or day, and those that stand for the patient."""

    visits: dict[str, dict[str, list[DatedRow]]] = field(default_factory=dict)
    """Table -> patient -> rows."""
    patients: dict[str, dict[str, LayoutRow]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    scanned: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Place:
    """Who and when a scan is of."""

    patient: str
    date: datetime.date | None
    day: int | None


def import_tree(run: LayoutImport) -> None:
    """Add the scans of a plain tree."""
    run.use_series("*")
    run.in_header = not run.options.pattern
    tables = _read_tables(run)
    if run.options.pattern:
        _add_by_path(run, tables)
    else:
        _add_by_header(run, tables)
    for by_patient in tables.visits.values():
        for entry in (entry for entries in by_patient.values() for entry in entries):
            if entry.name not in tables.used:
                run.leave_out(entry.name, Cause.NO_SCAN, "no scan is nearest to it", rows=1)
    for kind, people in tables.patients.items():
        for patient in people.keys() - tables.scanned:
            run.leave_out(f"{kind} row {people[patient].number}", Cause.NO_SCAN, f"of '{patient}'", rows=1)


def _read_tables(run: LayoutImport) -> _TreeTables:
    headers = [find_header(path) for path in run.options.tables]
    for key in COLUMNS.keys() & run.options.columns.keys():
        column = run.options.columns[key]
        require(any(table.has([column]) for table in headers), f"no table has the column '{column}' (--column {key})")
    keys = [{key: _key_column(run, table, key) for key in COLUMNS} for table in headers]
    run.find_attributes({table.name: table.header for table in headers})
    tables = _TreeTables()
    for table, columns in zip(headers, keys, strict=True):
        if not columns["patient"]:
            raise TableError(f"'{table.path}' has no column of patients: --column patient=NAME says which it is")
        by_patient: dict[str, list[DatedRow]] = defaultdict(list)
        people: dict[str, LayoutRow] = {}
        for row in run.read(table, table.name, *filter(None, columns.values())):
            _read_row(run, table, columns, row, by_patient, people)
        dated = columns["date"] or columns["day"]
        by = f"patient and {dated}" if dated else "patient"
        run.state(f"{table.name}: joined by {by} (column '{columns['patient']}')")
        if dated:
            tables.visits[table.name] = by_patient
        else:
            tables.patients[table.name] = people
    return tables


def _key_column(run: LayoutImport, table: LayoutTable, key: str) -> str:
    wanted = run.options.columns.get(key)
    names = (wanted,) if wanted else COLUMNS[key]
    return next((name for name in names if table.has([name])), "")


def _read_row(
    run: LayoutImport,
    table: LayoutTable,
    columns: Mapping[str, str],
    row: LayoutRow,
    visits: dict[str, list[DatedRow]],
    people: dict[str, LayoutRow],
) -> None:
    patient, name = row.get(columns["patient"]), f"{table.name} row {row.number}"
    if not columns["date"] and not columns["day"]:
        if people.setdefault(patient, row) is not row:
            run.leave_out(name, Cause.DUPLICATE, f"another row of '{patient}' counts", rows=1)
        return
    cell = row.get(columns["date"] or columns["day"])
    date = date_of(cell, run.options.date_format) if columns["date"] else None
    when = date.toordinal() if date is not None else None if columns["date"] else day_of(cell)
    if when is None:
        run.leave_out(name, Cause.NO_DATE, f"'{cell}' is no date or day; see --date-format", rows=1)
    else:
        visits[patient].append(DatedRow(when, row, table.name))


def _rows_of(
    run: LayoutImport, name: str, place: _Place, tables: _TreeTables, files: int
) -> dict[str, LayoutRow] | None:
    """A scan's row of each table; None where one is missing, and then the scan is left out."""
    tables.scanned.add(place.patient)
    rows: dict[str, LayoutRow] = {}
    for kind, people in tables.patients.items():
        if place.patient not in people:
            run.leave_out(name, Cause.NO_ROW, f"{kind} has no row of '{place.patient}'", files=files)
            return None
        rows[kind] = people[place.patient]
    when = place.date.toordinal() if place.date is not None else place.day
    for kind, by_patient in tables.visits.items():
        columns = [column for found in run.sources.values() for table, column in found if table == kind]
        if when is None:
            run.leave_out(name, Cause.NO_DATE, f"{kind} is joined by date or day", files=files)
            return None
        found = nearest_row(
            by_patient.get(place.patient, []),
            when,
            run.options.tolerance_days or 0,
            lambda row, columns=columns: [row.get(column) for column in columns],  # type: ignore[misc]
        )
        if not isinstance(found, DatedRow):
            run.leave_out(name, *found, files=files)
            return None
        rows[kind] = found.row
        tables.used.add(found.name)
    return rows


def _add(run: LayoutImport, tables: _TreeTables, place: _Place, visit: LayoutVisit) -> None:
    rows = _rows_of(run, visit.name, place, tables, visit.files)
    if rows is None:
        return
    values = run.attributes(visit.name, place.patient, rows, {}, visit.files)
    if values is not None:
        visit.attributes = values
        visit.age_of_patient = not tables.visits
        run.add(visit)


def _pattern(text: str) -> re.Pattern[str]:
    """A regular expression of a pattern such as `{patient}/{date}/*.nii.gz`."""
    parts = re.split(r"(\{\w*\}|\*\*/|\*\*|\*|\?)", text.strip("/"))
    known = {f"{{{name}}}": expression for name, expression in PLACES.items()}
    known |= {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    unknown = [part for part in parts if part.startswith("{") and part not in known]
    require(not unknown, f"--pattern has {', '.join(unknown)}: use {', '.join(f'{{{name}}}' for name in PLACES)}")
    require("{patient}" in text, f"--pattern '{text}' does not say where {{patient}} is")
    seen: set[str] = set()
    for place, part in enumerate(parts):
        if part in seen and part.startswith("{"):
            known_twice = f"(?P={part[1:-1]})"
            parts[place] = known_twice
        else:
            seen.add(part)
            parts[place] = known.get(part, re.escape(part))
    return re.compile("".join(parts))


def _add_by_path(run: LayoutImport, tables: _TreeTables) -> None:
    """Each file, or with a slash at the pattern's end each folder of DICOM, whose path the pattern describes."""
    pattern, of_folders = _pattern(run.options.pattern), run.options.pattern.endswith("/")
    slices = run.modality.image.plane != "none" and run.options.pattern.lower().endswith(DICOM)
    require(not slices, f"--pattern '{run.options.pattern}' names slices: end it with a slash for a folder a series")
    run.state(f"patient and time: by the path, {run.options.pattern}")
    run.unnamed = (Cause.NOT_IN_LAYOUT, "--pattern does not describe its path")
    scans: dict[str, list[str]] = defaultdict(list)
    for name in run.files:
        if of_folders:
            folders = [str(folder) for folder in PurePosixPath(name).parents if pattern.fullmatch(str(folder))]
            if folders:
                scans[folders[0]].append(name)
        elif pattern.fullmatch(name):
            scans[name].append(name)
    for name, files in scans.items():
        if not of_folders and not name.lower().endswith(IMAGES):
            continue
        run.explain(files)
        match = pattern.fullmatch(name)
        parts = match.groupdict() if match else {}
        date = date_of(parts.get("date", ""), run.options.date_format) if "date" in parts else None
        day = day_of(parts.get("day", "")) if "day" in parts else None
        if (date is None and "date" in parts) or (day is None and "day" in parts):
            text = parts.get("date", parts.get("day"))
            run.leave_out(name, Cause.NO_DATE, f"'{text}' is no date or day; see --date-format", files=len(files))
        elif run.tier(name) is None:
            run.leave_out(name, Cause.NOT_SELECTED, "", files=len(files))
        else:
            place = _Place(parts["patient"], date, None if date else day)
            visit = LayoutVisit(place.patient, name, {}, place.date, place.day, label=name, files=len(files))
            _add(run, tables, place, visit)


def _add_by_header(run: LayoutImport, tables: _TreeTables) -> None:
    """Each DICOM series, by the PatientID and StudyDate of its headers."""
    run.state("patient and date: PatientID and StudyDate of the DICOM headers")
    series = _read_series(run)
    holders: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for key, slices in series.items():
        for folder in {folder for name, _ in slices for folder in PurePosixPath(name).parents}:
            holders[str(folder)].add(key)
    for key, slices in series.items():
        _add_series(run, tables, key, slices, holders)


def _read_series(run: LayoutImport) -> dict[tuple[str, str], list[tuple[str, DicomHeader]]]:
    """Patient and series, or image where the modality's scans are images -> its files and headers."""
    from ld_common.core.ahead import available_processors
    from ld_common.imaging.readers import read_headers
    from ld_common.imaging.rejection import Rejection, ScanRejected

    names: list[str] = []
    tables = {path.resolve() for path in run.options.tables}
    for name in run.files:
        if name.lower().endswith(tuple(ending for ending in IMAGES if ending not in DICOM)):
            run.leave_out(name, Cause.NOT_IN_LAYOUT, "not DICOM: --pattern reads it by its path")
        elif (run.root / name).resolve() not in tables:
            names.append(name)
    series: dict[tuple[str, str], list[tuple[str, DicomHeader]]] = defaultdict(list)
    causes = {Rejection.NOT_AN_IMAGE: Cause.NOT_A_SCAN, Rejection.WRONG_MODALITY: Cause.NOT_SELECTED}
    # whether text is burned in is judged by ld-client index
    files = [(run.root / name, True) for name in names]
    headers = read_headers(files, run.modality.dicom_modalities, available_processors())
    for done, (name, images) in enumerate(zip(names, headers, strict=True), start=1):
        run.progress("reading headers", done, len(names))
        if isinstance(images, ScanRejected):
            cause = causes.get(images.rejection, Cause.UNREADABLE)
            run.leave_out(name, cause, f"{images.rejection.value}: {images.detail}")
        else:
            header = images[0]
            of_volume = run.modality.image.plane != "none" and header.series_uid
            series[header.patient_id, header.series_uid if of_volume else name].append((name, header))
    return series


def _add_series(
    run: LayoutImport,
    tables: _TreeTables,
    key: tuple[str, str],
    slices: list[tuple[str, DicomHeader]],
    holders: Mapping[str, set[tuple[str, str]]],
) -> None:
    """Add one series: as its own file or folder, or else, with other series in its folder, matched by its header."""
    names, header = [name for name, _ in slices], slices[0][1]
    run.explain(names)
    folder = posixpath.commonpath([posixpath.dirname(name) for name in names])
    own = folder if folder and holders[folder] == {key} else ""
    file = names[0] if key[1] == names[0] else own
    shown = file or names[0]
    if not header.patient_id or header.study_date is None:
        detail = "the header has no PatientID or no StudyDate"
        return run.leave_out(shown, Cause.NO_DATE, detail, files=len(names))
    if run.tier(shown, header.series_description) is None:
        return run.leave_out(shown, Cause.NOT_SELECTED, header.series_description, files=len(names))
    place = _Place(header.patient_id, header.study_date, None)
    visit = LayoutVisit(place.patient, file, {}, date=place.date, files=len(names), label=shown)
    visit.series = header.series_description
    return _add(run, tables, place, visit)
