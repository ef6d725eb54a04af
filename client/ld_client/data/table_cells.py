"""The cells of a site's row: of the table, of the tables joined to it, and those that patterns extract."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ld_client.data.exclusions import Exclusion, Reason
from ld_client.data.table_paths import extract, placeholders
from ld_client.data_config import DataConfig, JoinedConfig
from ld_common.core.config import nearest
from ld_common.core.errors import TableError
from ld_common.core.tables import NOT_UTF_8, OpenTable, Row, decimal_point, open_table

BLANK = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-"})
NUMBER = re.compile(r"[-+]?(0|[1-9]\d*)(\.\d+)?")
"""Numbers that count as equal however they are written; `007` is a name."""
TABLE = "table"
"""The main table as a source of columns."""


def is_blank(cell: str) -> bool:
    """Whether a cell says nothing."""
    return cell.lower() in BLANK


def same(cell: str, word: str) -> bool:
    """Whether a cell says what a word of the config does; 1 and 1.0 are the same."""
    if cell == word:
        return True
    return bool(NUMBER.fullmatch(cell) and NUMBER.fullmatch(word)) and float(cell) == float(word)


def used_columns(data: DataConfig) -> dict[str, str]:
    """The columns that are read, by their keys in `data`."""
    columns = data.columns
    single = ("patient", "date", "day", "file", "age_at_baseline", "baseline_date")
    used = {f"columns.{key}": getattr(columns, key) for key in single if getattr(columns, key)}
    used |= {f"columns.attributes.{name}": column for name, column in columns.attributes.items()}
    used |= {f"where.{column}": column for column in data.where}
    for name, rules in data.rules.items():
        used |= {f"rules.{name}.{column}": column for rule in rules for column in rule.where}
    used |= {f"extract.{column}": column for column in data.extract}
    for number, other in enumerate(data.joined):
        used |= {f"joined.{number}.by.{column}": column for column in other.by}
    used |= {f"file_pattern.{column}": column for column in placeholders(data.file_pattern)}
    return used


@dataclass
class JoinedTable:
    """The cells of a further table, by those that it is joined by."""

    config: JoinedConfig
    columns: list[str]
    """With the prefix."""
    separator: str
    rows: dict[tuple[str, ...], tuple[int, dict[str, str]]] = field(default_factory=dict)
    """Key -> the row's number and its cells that are used."""
    disagreeing: dict[tuple[str, ...], str] = field(default_factory=dict)
    """Key -> what is wrong with its rows."""
    exclusions: list[Exclusion] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the file, for messages."""
        return Path(self.config.table).name

    @property
    def shared(self) -> list[str]:
        """Columns that it is joined by and that both tables have, so that their cells are equal."""
        return [column for column, other in self.config.by.items() if self.config.prefix + other == column]

    def join(self, cells: dict[str, str]) -> str:
        """Add this table's cells to those of a row; returns what is wrong, or an empty text."""
        key = tuple(cells[column] for column in self.config.by)
        cells.update(self.rows.get(key, (0, {}))[1])
        return self.disagreeing.get(key, "")


def read_joined(data: DataConfig) -> list[JoinedTable]:
    """The tables of `data.joined`, with the columns that are used.

    Raises:
        TableError: one cannot be read, or lacks a column that it is joined by.
    """
    return [_read_joined(number, other, set(used_columns(data).values())) for number, other in enumerate(data.joined)]


def _read_joined(number: int, other: JoinedConfig, used: Collection[str]) -> JoinedTable:
    path = Path(other.table)
    with open_table(path, encoding=other.encoding) as opened:
        joined = JoinedTable(other, [other.prefix + name for name in opened.header if name], opened.separator)
        by_prefixed = {other.prefix + name: name for name in opened.header if other.prefix + name in used}
        needed = [*other.by.values(), *by_prefixed.values()]
        missing = [column for column in other.by.values() if column not in opened.header]
        problems = _absent(opened, {f"joined.{number}.by": column for column in missing}, opened.header)
        problems += [f"column '{column}' occurs more than once" for column in opened.twice(needed)]
        if problems:
            raise TableError(f"the table '{path}' does not fit the site's config: {'; '.join(problems)}")
        for row in opened.rows:
            if problem := row.problem(needed):
                name = f"row {row.number} of {joined.name}"
                joined.exclusions.append(Exclusion(name, 0, Reason.BROKEN_ROW, with_remedy(problem)))
                continue
            key = tuple(row.cells[column] for column in other.by.values())
            cells = {prefixed: row.cells[name] for prefixed, name in by_prefixed.items()}
            if any(map(is_blank, key)):
                continue
            earlier, same_cells = joined.rows.setdefault(key, (row.number, cells))
            if cells != same_cells:
                joined.disagreeing.setdefault(
                    key, f"rows {earlier} and {row.number} of {joined.name} belong to this row and disagree"
                )
    return joined


class RowReader:
    """Makes one row of the main table, the joined tables and the patterns of `data.extract`."""

    def __init__(self, data: DataConfig, opened: OpenTable, joined: list[JoinedTable]) -> None:
        """Check the columns of the tables.

        Raises:
            TableError: a column is absent, occurs more than once, or in several tables.
        """
        self._data, self._joined, used = data, joined, used_columns(data)
        self._extracted = {column: placeholders(pattern) for column, pattern in data.extract.items()}
        self._separators = dict.fromkeys(opened.header, opened.separator)
        sources: dict[str, set[str]] = {name: {TABLE} for name in opened.header if name}
        for column, names in self._extracted.items():
            for name in names:
                sources.setdefault(name, set()).add(f"extract.{column}")
        for number, other in enumerate(joined):
            for name in set(other.columns).difference(other.shared):
                sources.setdefault(name, set()).add(f"joined.{number}")
                self._separators.setdefault(name, other.separator)
        _check(data, opened, used, sources)
        self._main = [column for column in used.values() if TABLE in sources[column]]
        self._others = [column for column in used.values() if TABLE not in sources[column]]

    def cells(self, row: Row) -> dict[str, str] | Exclusion:
        """The cells of the columns that are used, or why the row cannot be used."""
        name = f"row {row.number}"
        if problem := row.problem(self._main):
            return Exclusion(name, 0, Reason.BROKEN_ROW, with_remedy(problem))
        cells = dict.fromkeys(self._others, "") | {column: row.cells[column] for column in self._main}
        for column, names in self._extracted.items():
            text = row.cells[column].replace("\\", "/") if "/" in self._data.extract[column] else row.cells[column]
            cells |= extract(self._data.extract[column], text) or dict.fromkeys(names, "")
        for other in self._joined:
            if problem := other.join(cells):
                return Exclusion(name, 0, Reason.CONFLICTING_ROWS, problem)
        return cells

    def number(self, column: str, cells: Mapping[str, str]) -> str:
        """A cell, with a point for a decimal comma."""
        return decimal_point(cells[column], self._separators.get(column, ","))


def with_remedy(problem: str) -> str:
    """The problem of a row as a site can solve it."""
    return f"{problem}, or name its encoding by data.encoding" if problem.endswith(NOT_UTF_8) else problem


def _check(data: DataConfig, opened: OpenTable, used: Mapping[str, str], sources: Mapping[str, set[str]]) -> None:
    """Raise `TableError` unless each column that is used, by its key, comes from one source that may have it."""
    absent = {}
    for key, column in used.items():
        found = sources.get(column, set())
        if key.startswith("extract."):
            found = found & {TABLE}
        if key.startswith("joined."):
            found = {source for source in found if not source.startswith("joined.")}
        if not found:
            absent[key] = column
    problems = _absent(opened, absent, list(sources))
    problems += [f"column '{column}' occurs more than once" for column in opened.twice(used.values())]
    problems += [
        f"column '{column}' comes from {' and '.join(f'data.{source}' for source in sorted(sources[column]))}: set a "
        "prefix in data.joined, or another name in data.extract"
        for column in sorted({column for column in used.values() if len(sources.get(column, ())) > 1})
    ]
    if problems:
        raise TableError(f"the table '{data.table}' does not fit the site's config: {'; '.join(problems)}")


def _absent(opened: OpenTable, absent: Mapping[str, str], known: Collection[str]) -> list[str]:
    """A sentence for each column that is not there."""
    problems = [
        f"no column '{column}' (data.{key}): {nearest(column, [name for name in known if name])}"
        for key, column in absent.items()
    ]
    if "columns.date" in absent:
        problems.append(
            'for a table without dates set data.columns.date to "", for one with days since entry set data.columns.day'
        )
    if absent and not opened.is_utf_8:
        problems.append("the header is not UTF-8: save the table as UTF-8, or name its encoding by data.encoding")
    return problems
