"""CheXpert: `train/patient00001/study1/view1_frontal.jpg` with train.csv and valid.csv. It has no dates."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import PurePosixPath

from ld_client.layouts.base import DIAGNOSIS, LayoutImport
from ld_client.layouts.entries import Cause, Conflict, LayoutVisit
from ld_client.layouts.radiographs import computed_diagnosis, require_labels, view_problem
from ld_client.layouts.tables import LayoutRow, LayoutTable, find_header
from ld_common.core.config import require
from ld_common.core.errors import TableError

PATH, VIEW, PROJECTION = "Path", "Frontal/Lateral", "AP/PA"
SCAN = re.compile(r"(?:.*/)?patient(?P<patient>\d+)/study(?P<study>\d+)/view\d+_(?P<view>frontal|lateral)\.\w+")
TABLES = ("train.csv", "valid.csv", "test.csv")


def import_chexpert(run: LayoutImport) -> None:
    """Add the frontal radiographs of CheXpert."""
    run.use_series("*")
    tables = _tables(run)
    run.unnamed = (Cause.NO_ROW, "no row names this file")
    diagnosis = [DIAGNOSIS] if require_labels(run, tables[0]) else []
    run.find_attributes({table.name: table.header for table in tables}, diagnosis)
    run.state(f"view: {VIEW} is Frontal, and {PROJECTION} is of the modality's view positions where it is given")
    findings = [label.finding for label in run.options.labels]
    present = set(run.files)
    for table in tables:
        for row in run.read(table, table.name, PATH, VIEW, PROJECTION, *findings):
            _add_row(run, table, row, present)
    studies: Mapping[str, set[str]] = defaultdict(set)
    for visit in run.visits:
        studies[visit.patient].add(visit.label)
    several = sum(len(labels) > 1 for labels in studies.values())
    require(
        not several or bool(run.options.one_visit),
        f"CheXpert has no dates, only the order of studies, and {several} patients have several: --one-visit first (or "
        "last) takes one study of each patient",
    )


def _tables(run: LayoutImport) -> list[LayoutTable]:
    """Those of --table, or else train.csv and valid.csv in the root, in its folders or beside it."""
    paths = [*run.options.tables]
    for pattern in ("", "*/", "../") if not paths else ():
        paths = [path for name in TABLES for path in sorted(run.root.glob(f"{pattern}{name}"))]
        if paths:
            break
    tables = [find_header(path) for path in paths]
    for table in tables:
        if not table.has([PATH, "Sex", "Age", VIEW]):
            raise TableError(f"the table '{table.path}' is not CheXpert's: it lacks {PATH}, Sex, Age or {VIEW}")
    if not tables:
        raise TableError(f"no {' or '.join(TABLES)} in '{run.root}', its folders or beside it: use --table FILE")
    if len({table.name for table in tables}) < len(tables):
        names = ", ".join(f"'{table.path}'" for table in tables)
        raise TableError(f"two tables of one name: {names}; name each table to read by --table")
    return tables


def _add_row(run: LayoutImport, table: LayoutTable, row: LayoutRow, present: set[str]) -> None:
    path = row.get(PATH).replace("\\", "/")
    match, name = SCAN.fullmatch(path), f"{table.name} row {row.number}"
    if match is None:
        return run.leave_out(name, Cause.NOT_IN_LAYOUT, f"'{path}' is not patient.../study.../view..._frontal", rows=1)
    file = _file(path, present)
    if file is None:
        return run.leave_out(name, Cause.NO_FILE, path, rows=1)
    patient = f"patient{match['patient']}"
    if match["view"] != row.get(VIEW).lower():
        run.contradict(Conflict.NAMES, patient, f"{path} is '{row.get(VIEW)}'")
        return run.leave_out(file, Cause.CONFLICT, f"its name and {VIEW} '{row.get(VIEW)}' disagree")
    frontal = row.get(VIEW).lower() == "frontal"
    problem = view_problem(run, row.get(PROJECTION)) if frontal and row.get(PROJECTION) else None
    if not frontal or problem:
        return run.leave_out(file, *(problem or (Cause.OTHER_VIEW, row.get(VIEW))))
    if run.tier(file, row.get(PROJECTION)) is None:
        return run.leave_out(file, Cause.NOT_SELECTED, "")
    computed = computed_diagnosis(run, file, row)
    values = None if computed is None else run.attributes(file, patient, {table.name: row}, computed)
    if values is not None:
        study = int(match["study"])
        run.add(LayoutVisit(patient, file, values, label=str(study), order=study, series=row.get(PROJECTION)))
    return None


def _file(path: str, present: set[str]) -> str | None:
    """The file that a row names, whose path starts with the data set's folder or anywhere below it."""
    parts = PurePosixPath(path).parts
    tails = ("/".join(parts[start:]) for start in range(len(parts) - 3))
    return next((tail for tail in tails if tail in present), None)
