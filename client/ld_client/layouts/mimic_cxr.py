"""MIMIC-CXR and MIMIC-CXR-JPG: `files/p10/p10000032/s50414267/<dicom_id>.jpg` or .dcm, with three tables."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field

from ld_client.layouts.base import DIAGNOSIS, SEX, LayoutImport
from ld_client.layouts.dates import date_of
from ld_client.layouts.entries import Cause, LayoutVisit
from ld_client.layouts.radiographs import computed_diagnosis, require_labels, view_problem
from ld_client.layouts.tables import LayoutRow
from ld_common.core.config import is_number
from ld_common.imaging.modality import AGE

METADATA, LABELS, PATIENTS = "metadata.csv", "chexpert.csv", "patients.csv"
SUBJECT, STUDY, IMAGE, VIEW = "subject_id", "study_id", "dicom_id", "ViewPosition"
DATE, TIME = "StudyDate", "StudyTime"
GENDER, ANCHOR_AGE, ANCHOR_YEAR = "gender", "anchor_age", "anchor_year"
WITHHELD_AGE = 91
"""The anchor age of everybody over 89."""


@dataclass
class _Studies:
    """What the tables say of studies and patients, and the files of the images."""

    labels: dict[tuple[str, str], LayoutRow] = field(default_factory=dict)
    patients: dict[str, LayoutRow] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    """Image id -> its files."""
    labelled: set[tuple[str, str]] = field(default_factory=set)
    """Studies whose labels were asked for."""
    seen: set[str] = field(default_factory=set)
    """Patients with an image."""


def import_mimic_cxr(run: LayoutImport) -> None:
    """Add the frontal radiographs of MIMIC-CXR."""
    run.use_series("*")
    run.unnamed = (Cause.NO_ROW, "no row names this file")
    run.state(f"view: {VIEW} is one of the modality's view positions; images without one are left out")
    run.state(f"date: {DATE}, shifted by the data set for each patient; of several images a day, the first by {TIME}")
    columns = [IMAGE, SUBJECT, STUDY, VIEW, DATE]
    metadata = run.need_table("table of images", ["*metadata.csv", "*metadata.csv.gz"], columns)
    studies = _read_tables(run, metadata.header)
    for name in run.files:
        studies.files.setdefault(name.rpartition("/")[2].partition(".")[0], []).append(name)
    for row in run.read(metadata, METADATA, *columns, TIME):
        _add_image(run, f"{metadata.name} row {row.number}", row, studies)
    if unlabelled := len(studies.labels.keys() - studies.labelled):
        run.leave_out(LABELS, Cause.NO_SCAN, "studies without an image of an accepted view", rows=unlabelled)
    if without := len(studies.patients.keys() - studies.seen):
        run.leave_out(PATIENTS, Cause.NO_SCAN, "patients without an image", rows=without)


def _read_tables(run: LayoutImport, header: tuple[str, ...]) -> _Studies:
    """Read the labels, and the patients' sex and age."""
    needed = [name for name in (AGE, SEX) if name in run.modality.attributes]
    labels = run.find_table("table of labels", ["*chexpert.csv", "*chexpert.csv.gz"], [SUBJECT, STUDY, "No Finding"])
    patients = run.find_table("table of patients", ["patients.csv", "patients.csv.gz"], [SUBJECT, GENDER, ANCHOR_AGE])
    if needed and patients is None:
        patients = run.need_table(
            "table of patients (of MIMIC-IV's hosp module)", ["patients.csv", "patients.csv.gz"], [SUBJECT, GENDER]
        )
    elsewhere = DIAGNOSIS in run.options.constants or DIAGNOSIS in run.options.columns
    if labels is None and DIAGNOSIS in run.modality.attributes and not elsewhere:
        labels = run.need_table("table of labels", ["*chexpert.csv", "*chexpert.csv.gz"], [SUBJECT, STUDY])
    by_label = labels is not None and require_labels(run, labels)
    tables = {METADATA: header} | ({LABELS: labels.header} if labels else {})
    run.find_attributes(tables, [*needed, *([DIAGNOSIS] if by_label else [])])
    studies = _Studies()
    if labels is not None:
        for row in run.read(labels, LABELS, SUBJECT, STUDY, *(label.finding for label in run.options.labels)):
            studies.labels[row.get(SUBJECT), row.get(STUDY)] = row
    if patients is not None:
        run.state(f"age: {ANCHOR_AGE} plus the years from {ANCHOR_YEAR} to the study; ages over 89 are withheld")
        for row in run.read(patients, PATIENTS, SUBJECT, GENDER, ANCHOR_AGE, ANCHOR_YEAR):
            studies.patients[row.get(SUBJECT)] = row
    return studies


def _add_image(run: LayoutImport, name: str, row: LayoutRow, studies: _Studies) -> None:
    files, subject, study = studies.files.get(row.get(IMAGE), []), row.get(SUBJECT), row.get(STUDY)
    if not files:
        return run.leave_out(name, Cause.NO_FILE, row.get(IMAGE), rows=1)
    file = files[0]
    if len(files) > 1:
        for each in files:
            run.leave_out(each, Cause.AMBIGUOUS, f"one of {', '.join(files)}: keep one under the root")
        return None
    if f"s{study}" not in file.split("/") or f"p{subject}" not in file.split("/"):
        return run.leave_out(file, Cause.CONFLICT, f"{name} says subject {subject}, study {study}")
    studies.seen.add(subject)
    problem, date = view_problem(run, row.get(VIEW)), date_of(row.get(DATE))
    if problem is not None:
        return run.leave_out(file, *problem)
    if date is None:
        return run.leave_out(file, Cause.NO_DATE, f"{DATE} is '{row.get(DATE)}'")
    if run.tier(file, row.get(VIEW)) is None:
        return run.leave_out(file, Cause.NOT_SELECTED, row.get(VIEW))
    studies.labelled.add((subject, study))
    return _add_visit(run, file, row, date, studies)


def _add_visit(run: LayoutImport, file: str, row: LayoutRow, date: datetime.date, studies: _Studies) -> None:
    subject = row.get(SUBJECT)
    labels = studies.labels.get((subject, row.get(STUDY)), LayoutRow(0, {}))
    computed = computed_diagnosis(run, file, labels)
    if computed is None:
        return None
    patient = studies.patients.get(subject, LayoutRow(0, {}))
    age, year = patient.get(ANCHOR_AGE), patient.get(ANCHOR_YEAR)
    if AGE in run.modality.attributes and age.isdecimal() and int(age) >= WITHHELD_AGE:
        return run.leave_out(file, Cause.MISSING_VALUE, f"no age: {ANCHOR_AGE} {age} stands for any over 89")
    known = age.isdecimal() and year.isdecimal()
    computed[AGE] = str(int(age) + date.year - int(year)) if known else ""
    computed[SEX] = patient.get(GENDER)
    values = run.attributes(file, subject, {METADATA: row, LABELS: labels}, computed)
    if values is not None:
        time = row.get(TIME)
        rank = int(1000 * float(time)) if is_number(time) else 0
        run.add(LayoutVisit(subject, file, values, date=date, series=row.get(VIEW), rank=rank))
    return None
