"""OASIS-3: sessions named by days from entry (`OAS30001_MR_d0129`), with the tables of CDR and demographics."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from ld_client.layouts.base import DIAGNOSIS, SEX, LayoutImport
from ld_client.layouts.dates import day_of
from ld_client.layouts.entries import Cause, Conflict, LayoutVisit
from ld_client.layouts.joins import TOLERANCE_DAYS, DatedRow, nearest_row
from ld_client.layouts.tables import LayoutRow
from ld_client.layouts.words import age_text, is_blank
from ld_common.core.config import is_number
from ld_common.imaging.modality import AGE

SCAN = re.compile(r"sub-(?P<patient>OAS\d+)_(?:ses|sess)-d(?P<day>\d+)_.*\.nii(?:\.gz)?")
SESSION = re.compile(r"(?P<patient>OAS\d+)_(?:MR_)?d(?P<day>\d+)(?:_.*)?")
CLINICAL, DEMOGRAPHICS = "OASIS3_UDSb4_cdr.csv", "OASIS3_demographics.csv"
ID, DAY, VISIT_AGE, DX, CDR = "OASISID", "days_to_visit", "age at visit", "dx1", "CDRTOT"
ENTRY_AGE, GENDER = "AgeatEntry", "GENDER"
HEALTHY = ("cognitively normal", "no dementia")
ALZHEIMER = re.compile(r"(?:ad dementia|dat|(?:ad dem|dat)[ /](?!cannot be primary).+)")
"""dx1 that names Alzheimer's disease as the primary cause; `dat` is dementia of the Alzheimer type."""
DAYS_OF_YEAR, AGE_YEARS = 365.25, 1.5


@dataclass
class _Patients:
    """What the tables say of each patient."""

    demographics: dict[str, LayoutRow] = field(default_factory=dict)
    visits: dict[str, list[DatedRow]] = field(default_factory=lambda: defaultdict(list))
    """Clinical visits with a diagnosis."""
    used: set[str] = field(default_factory=set)
    """Names of the clinical rows that a scan was joined with."""
    scanned: set[str] = field(default_factory=set)


def import_oasis3(run: LayoutImport) -> None:
    """Add the scans of OASIS-3."""
    run.use_series("*_T1w.nii", "*_T1w.nii.gz")
    tolerance = TOLERANCE_DAYS if run.options.tolerance_days is None else run.options.tolerance_days
    patients = _read_tables(run)
    run.state(f"diagnosis: {DX} of the visit nearest to the scan, at most {tolerance} days away (--tolerance-days)")
    run.state(f"age: {ENTRY_AGE} plus the days of the session's name")
    run.unnamed = (Cause.NOT_SELECTED, "only NIfTI is read of OASIS-3")
    scans = [name for name in run.files if name.lower().endswith((".nii", ".nii.gz"))]
    for name in run.each("scans", scans):
        _add_scan(run, name, patients, tolerance)
    for visits in patients.visits.values():
        for entry in visits:
            if entry.name not in patients.used:
                run.leave_out(entry.name, Cause.NO_SCAN, f"no scan is nearest to day {entry.when}", rows=1)
    without = len(patients.demographics.keys() - patients.scanned)
    if without:
        run.leave_out(DEMOGRAPHICS, Cause.NO_SCAN, "patients without a scan", rows=without)


def _read_tables(run: LayoutImport) -> _Patients:
    clinical = run.need_table("table of clinical visits", ["*UDSb4*.csv*"], [ID, DAY, DX])
    demographics = run.need_table("table of demographics", ["*demographics*.csv*"], [ID, ENTRY_AGE, GENDER])
    others = {CLINICAL: clinical.header, DEMOGRAPHICS: demographics.header}
    run.find_attributes(others, computed=[AGE, SEX, DIAGNOSIS])
    run.vocabulary[SEX] = {"1": "M", "2": "F"}
    patients = _Patients()
    for row in run.read(demographics, DEMOGRAPHICS, ID, ENTRY_AGE, GENDER):
        if patients.demographics.setdefault(row.get(ID), row) is not row:
            run.leave_out(f"{demographics.name} row {row.number}", Cause.DUPLICATE, f"of {row.get(ID)}", rows=1)
    for row in run.read(clinical, CLINICAL, ID, DAY, VISIT_AGE, DX, CDR):
        day, name = day_of(row.get(DAY)), f"{clinical.name} row {row.number}"
        if day is None:
            run.leave_out(name, Cause.NO_DATE, f"{DAY} is '{row.get(DAY)}'", rows=1)
        elif is_blank(row.get(DX)) and DIAGNOSIS in run.modality.attributes:
            run.leave_out(name, Cause.MISSING_VALUE, f"no {DX}", rows=1)
        else:
            _read_word(run, row.get(DX))
            patients.visits[row.get(ID)].append(DatedRow(day, row, clinical.name))
            _check_age(run, patients.demographics.get(row.get(ID)), row, day)
    return patients


def _read_word(run: LayoutImport, word: str) -> None:
    """Take a word of dx1 as healthy or Alzheimer's disease, where it says so and the modality has the value."""
    plain = " ".join(word.lower().split())
    value = "CN" if plain in HEALTHY else "AD" if ALZHEIMER.fullmatch(plain) else ""
    attribute = run.modality.attributes.get(DIAGNOSIS)
    if value and attribute is not None and value in attribute.categories:
        run.vocabulary.setdefault(DIAGNOSIS, {})[word.lower()] = value


def _check_age(run: LayoutImport, patient: LayoutRow | None, visit: LayoutRow, day: int) -> None:
    entry = patient.get(ENTRY_AGE) if patient is not None else ""
    stated = visit.get(VISIT_AGE)
    if is_number(entry) and is_number(stated):
        computed = float(entry) + day / DAYS_OF_YEAR
        if abs(computed - float(stated)) > AGE_YEARS:
            detail = f"{ENTRY_AGE} and day {day} make {computed:.1f}, '{VISIT_AGE}' is {stated}"
            run.contradict(Conflict.AGE_TABLES, visit.get(ID), detail)


def _add_scan(run: LayoutImport, name: str, patients: _Patients, tolerance: int) -> None:
    path = PurePosixPath(name)
    match = SCAN.fullmatch(path.name)
    sessions = [found for part in path.parts[:-1] if (found := SESSION.fullmatch(part))]
    if match is None:
        return run.leave_out(name, Cause.NOT_IN_LAYOUT, "not sub-OAS..._ses-d..._*.nii.gz")
    if run.tier(name) is None:
        return run.leave_out(name, Cause.NOT_SELECTED, "")
    patient, day = match["patient"], int(match["day"])
    if any((folder["patient"], int(folder["day"])) != (patient, day) for folder in sessions):
        run.contradict(Conflict.NAMES, patient, name)
        return run.leave_out(name, Cause.CONFLICT, "folder and file name another patient or day")
    patients.scanned.add(patient)
    rows = {}
    if patient in patients.demographics:
        rows[DEMOGRAPHICS] = patients.demographics[patient]
    visit = nearest_row(patients.visits.get(patient, []), day, tolerance, lambda row: row.get(DX))
    if isinstance(visit, DatedRow):
        rows[CLINICAL] = visit.row
        patients.used.add(visit.name)
    elif DIAGNOSIS in run.modality.attributes:
        return run.leave_out(name, *visit)
    return _add_visit(run, name, patient, day, rows)


def _add_visit(run: LayoutImport, name: str, patient: str, day: int, rows: dict[str, LayoutRow]) -> None:
    demographics, clinical = rows.get(DEMOGRAPHICS), rows.get(CLINICAL)
    entry = demographics.get(ENTRY_AGE) if demographics is not None else ""
    computed = {
        AGE: age_text(float(entry) + day / DAYS_OF_YEAR) if is_number(entry) else "",
        SEX: demographics.get(GENDER) if demographics is not None else "",
        DIAGNOSIS: clinical.get(DX) if clinical is not None else "",
    }
    values = run.attributes(name, patient, rows, computed)
    if values is None:
        return
    cdr = clinical.get(CDR) if clinical is not None else ""
    if is_number(cdr) and values.get(DIAGNOSIS) in ("CN", "AD") and (values[DIAGNOSIS] == "AD") != (float(cdr) > 0):
        run.contradict(Conflict.SEVERITY, patient, f"{computed[DIAGNOSIS]} with CDR {cdr} (day {day})")
    run.add(LayoutVisit(patient, name, values, day=day))
