"""A site's table of visits: rows by patient and date or by file, and excluded rows."""

from __future__ import annotations

import csv
import datetime
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ld_client.data.exclusions import Exclusion, Reason
from ld_client.site_config import ColumnsConfig, DataConfig
from ld_common.core.config import nearest
from ld_common.core.errors import TableError
from ld_common.core.tables import table_lines

BLANK = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-"})


@dataclass(frozen=True)
class TableRow:
    """One usable row; it names the patient and is never written to disk."""

    line: int
    """Line number; the header is line 1."""
    patient: str
    date: datetime.date
    file: str
    """Path relative to the data's root, POSIX form; empty where the table has no file column."""
    cells: dict[str, str]
    """Attribute -> cell, as the site wrote it; "" for a blank one."""


@dataclass
class Table:
    """The rows of a table by file, or by patient and date."""

    by_file: dict[str, TableRow] = field(default_factory=dict)
    by_patient: dict[str, dict[datetime.date, TableRow]] = field(default_factory=dict)
    """Rows without a file: patient -> date -> row."""
    exclusions: list[Exclusion] = field(default_factory=list)

    def rows(self) -> list[TableRow]:
        """All usable rows in the table's order."""
        dated = (row for visits in self.by_patient.values() for row in visits.values())
        return sorted([*self.by_file.values(), *dated], key=lambda row: row.line)

    def nearest(self, patient: str, date: datetime.date) -> tuple[TableRow | None, int]:
        """The patient's row nearest in time (of two, the earlier) and its distance in days; (None, 0) without one."""
        visits = self.by_patient.get(patient, {})
        if not visits:
            return None, 0
        nearest_date = min(visits, key=lambda day: (abs((day - date).days), day))
        return visits[nearest_date], abs((nearest_date - date).days)


def read_table(data: DataConfig) -> Table:
    """Read the table; rows that cannot be used are in its `exclusions`.

    Raises:
        TableError: the file does not exist, is not UTF-8 CSV or TSV, or lacks a configured column.
    """
    path, table = Path(data.table), Table()
    conflicting: set[tuple[str, datetime.date | str]] = set()
    try:
        with table_lines(path) as lines:
            first = next(lines, "")
            reader = csv.reader(itertools.chain([first] * bool(first), lines), delimiter=_delimiter(first), strict=True)
            header = [cell.strip() for cell in next(reader, [])]
            _check_columns(path, header, data.columns)
            for number, line in enumerate(reader, start=2):
                _add_line(table, number, dict(zip(header, map(str.strip, line), strict=False)), data, conflicting)
    except OSError as error:
        raise TableError(f"cannot read the table '{path}': {error.strerror or error}; see data.table") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise TableError(f"cannot read the table '{path}': {error}; save it as UTF-8 CSV or TSV") from error
    return table


def _add_line(
    table: Table,
    number: int,
    cells: dict[str, str],
    data: DataConfig,
    conflicting: set[tuple[str, datetime.date | str]],
) -> None:
    if any(cells.values()):
        row = _row(number, defaultdict(str, cells), data)
        if isinstance(row, Exclusion):
            table.exclusions.append(row)
        else:
            _add(table, row, conflicting)


def _delimiter(first: str) -> str:
    return max(",;\t", key=first.count)


def _check_columns(path: Path, header: Sequence[str], columns: ColumnsConfig) -> None:
    wanted = {"columns.patient": columns.patient, "columns.date": columns.date}
    if columns.file:
        wanted["columns.file"] = columns.file
    wanted |= {f"columns.attributes.{name}": column for name, column in columns.attributes.items()}
    problems = [
        f"no column '{column}' (data.{key}): {nearest(column, [name for name in header if name])}"
        for key, column in wanted.items()
        if column not in header
    ]
    twice = sorted({column for column in wanted.values() if header.count(column) > 1})
    problems += [f"column '{column}' occurs more than once" for column in twice]
    if problems:
        raise TableError(f"the table '{path}' does not fit the site's config: {'; '.join(problems)}")


def _row(number: int, cells: dict[str, str], data: DataConfig) -> TableRow | Exclusion:
    columns, name = data.columns, f"row {number}"
    patient, date = cells[columns.patient], parse_date(cells[columns.date], data.date_format)
    if _blank(patient) or date is None:
        shape = data.date_format or "YYYY-MM-DD"
        detail = "no patient" if _blank(patient) else f"no date of the form {shape}; see data.date_format"
        return Exclusion(name, 0, Reason.NO_PATIENT_OR_DATE, detail)
    file = cells[columns.file] if columns.file else ""
    file = "" if _blank(file) else PurePosixPath(file.replace("\\", "/")).as_posix()
    values = {
        # a value in the site's config is not blank: "none" may be a diagnosis
        name: "" if _blank(cells[column]) and cells[column] not in data.values.get(name, {}) else cells[column]
        for name, column in columns.attributes.items()
    }
    return TableRow(number, patient, date, file, values)


def _add(table: Table, row: TableRow, conflicting: set[tuple[str, datetime.date | str]]) -> None:
    """Add a row; of two equal rows the first is used, of two that disagree neither."""
    key: tuple[str, datetime.date | str] = ("", row.file) if row.file else (row.patient, row.date)
    dated = table.by_patient.setdefault(row.patient, {})
    earlier = table.by_file.get(row.file) if row.file else dated.get(row.date)
    if key in conflicting:
        table.exclusions.append(_conflict(row))
    elif earlier is None:
        if row.file:
            table.by_file[row.file] = row
        else:
            dated[row.date] = row
    elif (earlier.patient, earlier.date, earlier.cells) == (row.patient, row.date, row.cells):
        table.exclusions.append(Exclusion(f"row {row.line}", 0, Reason.DUPLICATE, f"the same as row {earlier.line}"))
    else:
        conflicting.add(key)
        table.exclusions += [_conflict(earlier), _conflict(row)]
        if row.file:
            del table.by_file[row.file]
        else:
            del dated[row.date]


def _conflict(row: TableRow) -> Exclusion:
    detail = "two rows of one scan disagree: keep the right one"
    return Exclusion(f"row {row.line}", 0, Reason.CONFLICTING_ROWS, detail)


def parse_date(text: str, date_format: str) -> datetime.date | None:
    """A cell's date, or None."""
    try:
        if date_format:
            return datetime.datetime.strptime(text, date_format).date()
        return datetime.datetime.fromisoformat(text).date()
    except ValueError:
        return None


def _blank(cell: str) -> bool:
    return cell.lower() in BLANK
