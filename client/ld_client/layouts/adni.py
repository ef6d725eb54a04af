"""ADNI: subject / series / date / image id, DICOM or NIfTI, with ADNIMERGE.csv or the collection's own table."""

from __future__ import annotations

import datetime
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from ld_client.layouts.base import DIAGNOSIS, SEX, LayoutImport
from ld_client.layouts.dates import date_of
from ld_client.layouts.entries import Cause, Conflict, LayoutVisit
from ld_client.layouts.joins import TOLERANCE_DAYS, DatedRow, nearest_row
from ld_client.layouts.tables import LayoutRow
from ld_client.layouts.words import age_text, is_blank
from ld_common.core.config import is_number
from ld_common.imaging.modality import AGE

SUBJECT = re.compile(r"\d{3}_S_\d{4,5}")
IMAGE_ID = re.compile(r"I\d+")
T1 = ("*mprage*", "*mp-rage*", "*mp_rage*", "*spgr*", "mpr", "mpr-r", "mpr_*", "mpr-r_*", "mt1_*")
"""Series descriptions of T1-weighted volumes: MPRAGE, IR-SPGR, and what ADNI processed from them (MPR__GradWarp...)."""
MERGE, COLLECTION = "ADNIMERGE.csv", "the collection's table"
PTID, EXAM, BASELINE, BASE_AGE, GENDER, DX = "PTID", "EXAMDATE", "EXAMDATE_bl", "AGE", "PTGENDER", "DX"
IMAGE, GROUP = "Image Data ID", "Group"
VOLUMES = (".nii", ".nii.gz")
DAYS_OF_YEAR, AGE_YEARS = 365.25, 1.5


@dataclass
class _Subjects:
    """What the tables say of each subject and image."""

    exams: dict[str, list[DatedRow]] = field(default_factory=lambda: defaultdict(list))
    """Visits of ADNIMERGE with a diagnosis."""
    baselines: dict[str, datetime.date] = field(default_factory=dict)
    people: dict[str, LayoutRow] = field(default_factory=dict)
    """The first row of each subject in ADNIMERGE."""
    images: dict[str, LayoutRow] = field(default_factory=dict)
    """Rows of the collection's table by image id."""
    merged: bool = False
    unclear: set[str] = field(default_factory=set)
    """Subjects of whom the tables give two sexes."""
    used: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Scan:
    """A series in the tree."""

    name: str
    files: int
    subject: str
    series: str
    date: datetime.date
    image: str


def import_adni(run: LayoutImport) -> None:
    """Add the scans of a download of ADNI."""
    run.use_series(*T1)
    run.in_header = False
    subjects = _read_tables(run)
    tolerance = TOLERANCE_DAYS if run.options.tolerance_days is None else run.options.tolerance_days
    if subjects.merged:
        run.state(f"diagnosis: {DX} of the exam nearest to the scan, at most {tolerance} days away (--tolerance-days)")
        run.state(f"age: {BASE_AGE}, which is the age at baseline, plus the time from {BASELINE} to the scan")
    else:
        run.state(f"diagnosis: {GROUP}, the group of the study, which does not change when a diagnosis does")
    run.state("of MPRAGE and its repeat on one day, the one that is not called a repeat is taken")
    for folder, names in _by_folder(run).items():
        for scan in _scans(run, folder, names):
            _add_scan(run, scan, subjects, tolerance)
    for exams in subjects.exams.values():
        for exam in exams:
            if exam.name not in subjects.used:
                run.leave_out(exam.name, Cause.NO_SCAN, "no scan is nearest to it", rows=1)


def _read_tables(run: LayoutImport) -> _Subjects:
    merge = run.find_table(MERGE, ["ADNIMERGE*.csv*"], [PTID, EXAM, BASE_AGE, GENDER, DX])
    collection = run.find_table(COLLECTION, ["*.csv"], [IMAGE, "Subject", GROUP, "Sex", "Age", "Acq Date"], True)
    if merge is None and collection is None:
        merge = run.need_table(MERGE, ["ADNIMERGE*.csv*"], [PTID, EXAM, BASE_AGE, GENDER, DX])
    headers = {MERGE: merge} if merge else {COLLECTION: collection}
    run.find_attributes({kind: table.header for kind, table in headers.items() if table}, [AGE, SEX, DIAGNOSIS])
    subjects = _Subjects(merged=merge is not None)
    if merge is not None:
        run.vocabulary[DIAGNOSIS] = {"dementia": "AD", "smc": "CN", "emci": "MCI", "lmci": "MCI"}
        for row in run.read(merge, MERGE, PTID, EXAM, BASELINE, BASE_AGE, GENDER, DX, "VISCODE"):
            _read_exam(run, subjects, merge.name, row)
    if collection is not None:
        for row in run.read(collection, COLLECTION, IMAGE, "Subject", GROUP, "Sex", "Age", "Acq Date"):
            subjects.images[row.get(IMAGE).upper()] = row
    return subjects


def _read_exam(run: LayoutImport, subjects: _Subjects, table: str, row: LayoutRow) -> None:
    subject, date, name = row.get(PTID), date_of(row.get(EXAM)), f"{table} row {row.number}"
    first = subjects.people.setdefault(subject, row)
    if first.get(GENDER) != row.get(GENDER) and not is_blank(row.get(GENDER)):
        run.contradict(Conflict.SEX_TABLES, subject, f"{first.get(GENDER)} and {row.get(GENDER)} in {table}")
        subjects.unclear.add(subject)
    baseline = date_of(row.get(BASELINE)) or (date if row.get("VISCODE") == "bl" else None)
    if baseline is not None:
        subjects.baselines.setdefault(subject, baseline)
    if date is None:
        run.leave_out(name, Cause.NO_DATE, f"{EXAM} is '{row.get(EXAM)}'", rows=1)
    elif is_blank(row.get(DX)) and DIAGNOSIS in run.modality.attributes:
        run.leave_out(name, Cause.MISSING_VALUE, f"no {DX}", rows=1)
    else:
        subjects.exams[subject].append(DatedRow(date.toordinal(), row, table))


def _by_folder(run: LayoutImport) -> Mapping[PurePosixPath, list[str]]:
    """Files of the subjects' folders, by folder."""
    folders: dict[PurePosixPath, list[str]] = defaultdict(list)
    for name in run.files:
        path = PurePosixPath(name)
        if any(SUBJECT.fullmatch(part) for part in path.parts[:-1]) and path.suffix.lower() not in (".xml", ".csv"):
            folders[path.parent].append(name)
    return folders


def _scans(run: LayoutImport, folder: PurePosixPath, names: list[str]) -> list[_Scan]:
    """The volumes of a folder: each NIfTI file, and the DICOM files together."""
    volumes = [name for name in names if name.lower().endswith(VOLUMES)]
    slices = [name for name in names if name not in volumes]
    run.explain(slices)
    found = [(name, 1) for name in volumes] + ([(folder.as_posix(), len(slices))] if slices else [])
    parts = folder.parts
    start = next(place for place, part in enumerate(parts) if SUBJECT.fullmatch(part))
    dated = [(place, date) for place in range(start + 1, len(parts)) if (date := date_of(parts[place])) is not None]
    if not dated:
        for name, files in found:
            run.leave_out(name, Cause.NO_DATE, "no folder of its path is a date", files=files)
        return []
    place, date = dated[0]
    image = next((part for part in reversed(parts[place:]) if IMAGE_ID.fullmatch(part)), "")
    series = "/".join(parts[start + 1 : place])
    return [_Scan(name, files, parts[start], series, date, image) for name, files in found]


def _add_scan(run: LayoutImport, scan: _Scan, subjects: _Subjects, tolerance: int) -> None:
    if not scan.series:
        run.state("scans without a folder of their series' description are taken whatever they show")
    elif run.tier(scan.name, scan.series) is None:
        return run.leave_out(scan.name, Cause.NOT_SELECTED, scan.series, files=scan.files)
    rows: dict[str, LayoutRow] = {}
    if subjects.merged:
        exam = nearest_row(
            subjects.exams.get(scan.subject, []), scan.date.toordinal(), tolerance, lambda row: row.get(DX)
        )
        if isinstance(exam, DatedRow):
            rows[MERGE] = exam.row
            subjects.used.add(exam.name)
        elif DIAGNOSIS in run.modality.attributes:
            return run.leave_out(scan.name, *exam, files=scan.files)
        rows.setdefault(MERGE, subjects.people.get(scan.subject, LayoutRow(0, {})))
    if scan.image.upper() in subjects.images:
        rows[COLLECTION] = subjects.images[scan.image.upper()]
    elif not subjects.merged:
        return run.leave_out(scan.name, Cause.NO_ROW, f"no row has the image id '{scan.image}'", files=scan.files)
    return _add_visit(run, scan, subjects, rows)


def _add_visit(run: LayoutImport, scan: _Scan, subjects: _Subjects, rows: Mapping[str, LayoutRow]) -> None:
    collection, merge = rows.get(COLLECTION), rows.get(MERGE)
    computed = {AGE: "", SEX: "", DIAGNOSIS: ""}
    if collection is not None:
        computed = {AGE: collection.get("Age"), SEX: collection.get("Sex"), DIAGNOSIS: collection.get(GROUP)}
        _check_date(run, scan, collection)
    if merge is not None:
        of_image, computed = computed, _of_exam(merge, scan, subjects.baselines.get(scan.subject))
        _compare(run, subjects, scan.subject, computed, of_image)
    if scan.subject in subjects.unclear:
        return run.leave_out(scan.name, Cause.CONFLICT, "the tables give the subject two sexes", files=scan.files)
    values = run.attributes(scan.name, scan.subject, rows, computed, scan.files)
    if values is not None:
        repeat = int("repeat" in scan.series.lower() or scan.series.lower().startswith("mpr-r"))
        visit = LayoutVisit(scan.subject, scan.name, values, date=scan.date, series=scan.series, files=scan.files)
        visit.rank = repeat
        run.add(visit)
    return None


def _of_exam(exam: LayoutRow, scan: _Scan, baseline: datetime.date | None) -> dict[str, str]:
    """Age, sex and diagnosis by ADNIMERGE; older versions write `MCI to Dementia` for a change."""
    age = exam.get(BASE_AGE)
    years = (scan.date - baseline).days / DAYS_OF_YEAR if baseline is not None else 0.0
    return {
        AGE: age_text(float(age) + years) if is_number(age) and baseline is not None else "",
        SEX: exam.get(GENDER),
        DIAGNOSIS: exam.get(DX).rpartition(" to ")[2],
    }


def _check_date(run: LayoutImport, scan: _Scan, collection: LayoutRow) -> None:
    text = collection.get("Acq Date")
    date = date_of(text, "%m/%d/%Y") or date_of(text)
    if date is not None and abs((date - scan.date).days) > 1:
        run.contradict(Conflict.DATES, scan.subject, f"{scan.name}: {scan.date} and {date}")


def _compare(
    run: LayoutImport, subjects: _Subjects, subject: str, merge: Mapping[str, str], collection: Mapping[str, str]
) -> None:
    """Note where the two tables give a subject another sex or age."""
    one, other = merge[SEX][:1].upper(), collection[SEX][:1].upper()
    if one and other and one != other:
        run.contradict(Conflict.SEX_TABLES, subject, f"{merge[SEX]} in {MERGE}, {collection[SEX]} in {COLLECTION}")
        subjects.unclear.add(subject)
    ages = merge[AGE], collection[AGE]
    if all(map(is_number, ages)) and abs(float(ages[0]) - float(ages[1])) > AGE_YEARS:
        run.contradict(Conflict.AGE_TABLES, subject, f"{ages[0]} by {MERGE}, {ages[1]} in {COLLECTION}")
