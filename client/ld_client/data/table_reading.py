"""Reads a site's table: dates, days and ages, rows that repeat or contradict each other, the files that rows name."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from ld_client.data.exclusions import Exclusion, Reason
from ld_client.data.table import DAYS_IN_YEAR, ENTRY, Table, TableRow, Time
from ld_client.data.table_cells import RowReader, is_blank, read_joined, same
from ld_client.data.table_paths import files_of_row, placeholders
from ld_client.data_config import ColumnsConfig, DataConfig
from ld_common.core.config import is_number
from ld_common.core.tables import Row, open_table
from ld_common.imaging.modality import AGE

MOST_DAYS = 100_000
"""Farthest visit from entry."""
HOLDS_DAYS = re.compile(r"(?<![a-z])days?(?![a-z])", re.IGNORECASE)
"""Name of a date column that may hold days since entry."""
WHOLE_NUMBER = re.compile(r"[-+]?\d{1,6}(\.0+)?")


def read_table(data: DataConfig) -> Table:
    """Read the table; rows that cannot be used are in its `exclusions`.

    Raises:
        TableError: a table cannot be read, is none, or lacks a configured column.
    """
    undated = _lacks_default_date(data)
    if undated:
        data = replace(data, columns=replace(data.columns, date=""))
    joined = read_joined(data)
    builder = _TableBuilder(data)
    if undated:
        builder.table.notes.append("the table has no column 'date': each patient has one visit; see data.columns.date")
    builder.table.exclusions += [exclusion for other in joined for exclusion in other.exclusions]
    passes = [builder.note_baseline, builder.add] if data.columns.age_at_baseline else [builder.add]
    for visit in passes:
        with open_table(Path(data.table), encoding=data.encoding) as opened:
            reader = RowReader(data, opened, joined)
            for row in opened.rows:
                visit(row, reader)
    return builder.finish()


def _lacks_default_date(data: DataConfig) -> bool:
    """Whether a table has no column of the name that date columns have where the config names none."""
    if data.columns.date != ColumnsConfig.date or data.columns.age_at_baseline or data.joined or data.extract:
        return False
    with open_table(Path(data.table), encoding=data.encoding) as opened:
        return ColumnsConfig.date not in opened.header


@dataclass
class _Baseline:
    """What the rows of a patient say of the baseline."""

    dates: set[datetime.date] = field(default_factory=set)
    ages: set[str] = field(default_factory=set)


class _TableBuilder:
    """Adds rows to a table, and settles at the end what only all rows can tell."""

    def __init__(self, data: DataConfig) -> None:
        self._data, self._columns = data, data.columns
        self._baselines: dict[str, _Baseline] = {}
        self._conflicting: set[tuple[str, datetime.date | str]] = set()
        self._filtered: Counter[str] = Counter()
        self._undated: dict[str, list[TableRow]] = {}
        self._has_dates = False
        self.table = Table(time=Time.DAY if self._columns.day else Time.DATE if self._columns.date else Time.NONE)

    def note_baseline(self, row: Row, reader: RowReader) -> None:
        """Note what a row says of its patient's baseline; for all rows before the first is added."""
        cells = reader.cells(row)
        if isinstance(cells, Exclusion):
            return
        baseline = self._baselines.setdefault(cells[self._columns.patient], _Baseline())
        column = self._columns.baseline_date
        date = parse_date(cells[column], self._data.date_format) if column else self._date(cells, reader)
        if isinstance(date, datetime.date):
            baseline.dates.add(date)
        age = reader.number(self._columns.age_at_baseline, cells)
        if not is_blank(age):
            baseline.ages.add(f"{float(age):g}" if is_number(age) else age)

    def add(self, row: Row, reader: RowReader) -> None:
        """Add a row, or what is wrong with it."""
        cells = reader.cells(row)
        if isinstance(cells, Exclusion):
            self.table.rows_by_patient[row.cells.get(self._columns.patient, "")] += 1
            self._exclude(cells, self._named_file(row.cells))
            return
        file = self._named_file(cells)
        unfit = self._unfit_column(cells, reader)
        if unfit is not None:
            self._filtered[unfit] += 1
            self._leave_out(file, Reason.ROW_NOT_SELECTED, f"row {row.number}: data.where leaves it out by its {unfit}")
            return
        self.table.rows_by_patient[cells[self._columns.patient]] += 1
        usable = self._row(row.number, cells, reader)
        if isinstance(usable, Exclusion):
            self._exclude(usable, file)
        elif self.table.time is Time.NONE:
            self._undated.setdefault(usable.patient, []).append(usable)
        else:
            self._add(usable)

    def finish(self) -> Table:
        """The table of all rows."""
        for column, count in self._filtered.items():
            accepted = " or ".join(self._data.where[column])
            detail = f"{count} {'row is' if count == 1 else 'rows are'} not {column} = {accepted}"
            self._exclude(Exclusion(f"table, data.where.{column}", 0, Reason.ROW_NOT_SELECTED, detail))
        for rows in self._undated.values():
            self._add_undated(rows)
        for file in self.table.by_file:
            self.table.left_out.pop(file, None)
        return self.table

    def _exclude(self, exclusion: Exclusion, file: str = "") -> None:
        self.table.exclusions.append(exclusion)
        self._leave_out(file, exclusion.reason, f"{exclusion.name}: {exclusion.detail}")

    def _leave_out(self, file: str, reason: Reason, detail: str) -> None:
        if not is_blank(file):
            self.table.left_out.setdefault(_path(file), (reason, detail))

    def _unfit_column(self, cells: Mapping[str, str], reader: RowReader) -> str | None:
        """The first column of `data.where` whose cell is not accepted."""
        unfit = (column for column, words in self._data.where.items() if not _says(column, words, cells, reader))
        return next(unfit, None)

    def _row(self, number: int, cells: Mapping[str, str], reader: RowReader) -> TableRow | Exclusion:
        name, patient = f"row {number}", cells[self._columns.patient]
        date = self._date(cells, reader)
        if is_blank(patient) or isinstance(date, str):
            return Exclusion(name, 0, Reason.NO_PATIENT_OR_DATE, date if isinstance(date, str) else "no patient")
        file = self._file(name, cells)
        if isinstance(file, Exclusion):
            return file
        values = {name: self._value(name, column, cells, reader) for name, column in self._columns.attributes.items()}
        for attribute, rules in self._data.rules.items():
            fitting = (
                rule.value
                for rule in rules
                if all(_says(column, words, cells, reader) for column, words in rule.where.items())
            )
            values[attribute] = next(fitting, "")
        if self._columns.age_at_baseline:
            if problem := self._baseline_problem(patient):
                return Exclusion(name, 0, Reason.CONFLICTING_ROWS, problem)
            values[AGE] = self._age(patient, date)
        return TableRow(number, patient, date, file, values)

    def _date(self, cells: Mapping[str, str], reader: RowReader) -> datetime.date | str:
        """When the visit was, or what is wrong with the cell; a column's first cell tells days from dates."""
        if self.table.time is Time.NONE:
            return ENTRY
        column = self._columns.day or self._columns.date
        days = reader.number(column, cells)
        is_day = WHOLE_NUMBER.fullmatch(days) is not None and abs(float(days)) <= MOST_DAYS
        if self.table.time is Time.DATE:
            date = parse_date(cells[column], self._data.date_format)
            if date is not None:
                self._has_dates = True
                return date
            holds_days = HOLDS_DAYS.search(column) and not self._has_dates and not self._data.date_format
            if not (is_day and holds_days):
                shape = self._data.date_format or "YYYY-MM-DD"
                hint = "for days since entry set data.columns.day" if is_day else "see data.date_format"
                return f"no date of the form {shape}; {hint}"
            self.table.time = Time.DAY
        if not is_day:
            return f"'{column}' is no whole number of days"
        return ENTRY + datetime.timedelta(days=int(float(days)))

    def _named_file(self, cells: Mapping[str, str]) -> str:
        """The cell of the file column, empty without one."""
        return cells.get(self._columns.file, "") if self._columns.file else ""

    def _file(self, name: str, cells: Mapping[str, str]) -> str | Exclusion:
        """The row's file, empty without one; an exclusion where `data.file_pattern` does not match exactly one."""
        if not self._data.file_pattern:
            file = self._named_file(cells)
            return "" if is_blank(file) else _path(file)
        for column in placeholders(self._data.file_pattern):
            if is_blank(cells[column]):
                return Exclusion(name, 0, Reason.NO_SCAN, f"no '{column}', which data.file_pattern needs")
        files = files_of_row(Path(self._data.root), self._data.file_pattern, cells)
        if len(files) == 1:
            return files[0]
        if not files:
            return Exclusion(name, 0, Reason.NO_SCAN, "0 files match data.file_pattern")
        for file in files:
            self._leave_out(file, Reason.SEVERAL_FILES, f"{len(files)} files match {name} by data.file_pattern")
        detail = f"{len(files)} files match, {files[0]} and {files[1]} among them: narrow data.file_pattern"
        return Exclusion(name, 0, Reason.SEVERAL_FILES, detail)

    def _value(self, name: str, column: str, cells: Mapping[str, str], reader: RowReader) -> str:
        """An attribute's cell as `data.values` or the modality knows it; "" for a blank one."""
        cell, translations = cells[column], self._data.values.get(name, {})
        if cell in translations:
            return cell  # and not blank: "none" may be a diagnosis
        number = reader.number(column, cells)
        return "" if is_blank(cell) else next((word for word in translations if same(number, word)), number)

    def _baseline_problem(self, patient: str) -> str:
        """Why a patient's age at baseline cannot be used; empty where it can."""
        baseline, columns = self._baselines.get(patient, _Baseline()), self._columns
        if len(baseline.ages) > 1:
            return (
                f"'{columns.age_at_baseline}' differs between the patient's rows, so it is no age at baseline: name it "
                f"in data.columns.attributes.{AGE}"
            )
        if columns.baseline_date and len(baseline.dates) > 1:
            return f"'{columns.baseline_date}' differs between the patient's rows"
        return ""

    def _age(self, patient: str, date: datetime.date) -> str:
        """The age at a date; "" where the table has no age or no date of baseline."""
        baseline = self._baselines.get(patient, _Baseline())
        start = ENTRY if self.table.time is Time.DAY else min(baseline.dates, default=None)
        age = next(iter(baseline.ages), "")
        if start is None or not is_number(age):
            return "" if start is None else age
        return f"{round(float(age) + (date - start).days / DAYS_IN_YEAR, 2):g}"

    def _add(self, row: TableRow) -> None:
        """Add a row; of two equal rows the first is used, of two that disagree neither."""
        key: tuple[str, datetime.date | str] = ("", row.file) if row.file else (row.patient, row.date)
        dated = self.table.by_patient.setdefault(row.patient, {})
        earlier = self.table.by_file.get(row.file) if row.file else dated.get(row.date)
        if key in self._conflicting:
            self._exclude(_conflict(row), row.file)
        elif earlier is None:
            if row.file:
                self.table.by_file[row.file] = row
            else:
                dated[row.date] = row
        elif (earlier.patient, earlier.date, earlier.cells) == (row.patient, row.date, row.cells):
            self._exclude_duplicate(row, earlier)
        else:
            self._conflicting.add(key)
            for conflicting in (earlier, row):
                self._exclude(_conflict(conflicting), row.file)
            if row.file:
                del self.table.by_file[row.file]
            else:
                del dated[row.date]

    def _exclude_duplicate(self, row: TableRow, earlier: TableRow) -> None:
        detail = f"the same as row {earlier.line}"
        self.table.exclusions.append(Exclusion(f"row {row.line}", 0, Reason.DUPLICATE, detail))
        self.table.rows_by_patient[row.patient] -= 1

    def _add_undated(self, rows: list[TableRow]) -> None:
        """Add the row of a patient without dates; of several that differ none, as nobody knows their order."""
        first, different = rows[0], False
        for row in rows[1:]:
            if (row.file, row.cells) == (first.file, first.cells):
                self._exclude_duplicate(row, first)
            else:
                different = True
        if not different:
            self._add(first)
            return
        kept = [row for row in rows if row is first or (row.file, row.cells) != (first.file, first.cells)]
        detail = (
            f"{len(kept)} rows of the patient have no date, so the time between them is unknown: set "
            "data.columns.date or day, or keep one of them by data.where"
        )
        for row in kept:
            self._exclude(Exclusion(f"row {row.line}", 0, Reason.NO_PATIENT_OR_DATE, detail), row.file)


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


def _says(column: str, words: Collection[str], cells: Mapping[str, str], reader: RowReader) -> bool:
    """Whether a row's cell is one of some words of the config."""
    cell, number = cells[column], reader.number(column, cells)
    return any(same(cell, word) or same(number, word) for word in words)


def _path(cell: str) -> str:
    """A cell's path in POSIX form."""
    return PurePosixPath(cell.replace("\\", "/")).as_posix()
