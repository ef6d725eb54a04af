"""The table of `ld-generate batch` and the outcomes that it writes."""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import RequestError
from ld_common.core.tables import open_table, readable

OUTCOMES = "batch.csv"
DRAWN, VISIT = "drawn", "visit"
"""Outcomes of rows that did not fail; a visit is a scan without a target, which other rows of its patient need."""
COLUMNS, REQUIRED = ("input", "target", "source", "slice", "history", "patient", "date"), ("input", "target")
FIRST, LAST = ("row", "input", "folder", "outcome"), ("warnings", "request")
"""Columns of `batch.csv` before and after those of an answer."""
RENAMED_COLUMNS = {"set": "target", "given": "source"}


@dataclass(frozen=True)
class BatchRow:
    """One scan of the table, as the file has it."""

    number: int
    """From 1."""
    input: str
    """Path of the scan, relative to the table."""
    target: str
    """Edits, separated by semicolons; empty for a visit that only other rows of its patient need."""
    source: str = ""
    slice: str = ""
    history: str = ""
    """Earlier scans of the patient as `SCAN@AGE`, separated by semicolons; paths are relative to the table."""
    patient: str = ""
    """Rows of one patient are visits of each other: those before a row are its history."""
    date: str = ""
    """ISO date of the visit."""
    problem: str = ""
    """Why the table's row cannot be read, as the rest of a sentence."""

    def check(self) -> None:
        """Raise `RequestError` for cells that cannot be meant so."""
        if self.problem:
            raise RequestError(self.problem)
        if self.slice and not self.slice.isdecimal():
            raise RequestError(f"slice is '{self.slice}': give the number of a slice, from 0")
        if self.patient and self.history:
            raise RequestError("the row has a patient and a history: the patient's rows are the history, empty one")
        if self.date and not self.patient:
            raise RequestError("the row has a date and no patient: a date puts the rows of one patient in order")
        if self.date and self.study_date is None:
            raise RequestError(f"date is '{self.date}': write it as YYYY-MM-DD")

    @property
    def study_date(self) -> datetime.date | None:
        """The date; None where there is none, or none that can be read."""
        try:
            return datetime.date.fromisoformat(self.date)
        except ValueError:
            return None

    @property
    def slice_index(self) -> int | None:
        """The slice of a volume; None for the one that training used."""
        return int(self.slice) if self.slice else None

    @property
    def only_visit(self) -> bool:
        """Whether nothing is drawn of it."""
        return bool(self.patient) and not self.target

    @property
    def folder(self) -> str:
        """Name of the folder of its results."""
        return f"{self.number:05d}_{Path(self.input).name}"


@dataclass(frozen=True)
class Outcome:
    """What became of a row."""

    row: int
    input: str
    folder: str
    outcome: str
    """`drawn`, `visit`, or the reason why not."""
    warnings: str
    """Those of its record, separated by semicolons."""
    request: str
    """Hash of the row, the visits before it, the release and all options; a row whose hash changed is drawn again."""
    answers: Sequence[dict[str, str]] = ()
    """For each counterfactual the cells of `batch.answer_cells`."""


def read_rows(table: Path) -> list[BatchRow]:
    """The rows of a table.

    Raises:
        RequestError: it cannot be read, has no row, lacks a column or has an unknown one.
    """
    with open_table(table, RequestError, columns=COLUMNS) as opened:
        columns = [name for name in opened.header if name]
        _check_columns(table, columns)
        rows = [
            BatchRow(number, **{name: readable(row.cells[name]) for name in columns}, problem=row.problem(columns))
            for number, row in enumerate(opened.rows, start=1)
        ]
    if not rows:
        raise RequestError(f"'{table}' has no row: add one for each scan")
    return rows


def read_outcomes(path: Path) -> list[Outcome]:
    """The outcomes of an earlier run; empty where there are none, so that everything is drawn."""
    outcomes: dict[int, Outcome] = {}
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            for cells in csv.DictReader(stream):
                number = int(cells["row"])
                answer = {name: value for name, value in cells.items() if name not in (*FIRST, *LAST)}
                answers = [answer] if any(answer.values()) else []
                earlier = outcomes.get(number)
                outcomes[number] = Outcome(
                    number,
                    cells["input"],
                    cells["folder"],
                    cells["outcome"],
                    cells["warnings"],
                    cells["request"],
                    [*(earlier.answers if earlier else ()), *answers],
                )
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return list(outcomes.values())


def write_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write `batch.csv`, a line for each answer, and one for a row without; raises `CheckpointError`."""
    columns = dict.fromkeys(name for outcome in outcomes for answer in outcome.answers for name in answer)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [*FIRST, *columns, *LAST], lineterminator="\n")
    writer.writeheader()
    for outcome in outcomes:
        cells = {name: getattr(outcome, name) for name in (*FIRST, *LAST)}
        writer.writerows(cells | answer for answer in outcome.answers or [{}])
    write_bytes(path, stream.getvalue().encode())


def _check_columns(table: Path, columns: Sequence[str]) -> None:
    for old in (name for name in columns if name in RENAMED_COLUMNS):
        raise RequestError(f"'{table}': column '{old}' is now called '{RENAMED_COLUMNS[old]}'")
    for name in REQUIRED:
        if name not in columns:
            raise RequestError(f"'{table}' has no column '{name}': a table has {', '.join(COLUMNS)}")
    if unknown := sorted(set(columns) - set(COLUMNS)):
        raise RequestError(f"'{table}' has unknown columns: {', '.join(unknown)}; a table has {', '.join(COLUMNS)}")
