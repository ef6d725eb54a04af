"""What an importer is given and what it makes: visits, what is left out and why, contradictions, and the rules it used.

An importer is a function of a `LayoutImport`. It adds each scan of the layout that could be a visit; `settle` then
chooses among several scans of one visit. Neither picks silently: a scan, file or row that becomes no visit is a
`UnusedScan`, and each rule of the layout is a line of `statements`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ld_client.layouts.entries import Cause, Conflict, LayoutOptions, LayoutVisit, SourceConflict, UnusedScan
from ld_client.layouts.tables import LayoutRow, LayoutTable, find_header
from ld_client.layouts.words import is_blank, value_of
from ld_common.core.config import nearest, require
from ld_common.core.errors import TableError
from ld_common.imaging.modality import AGE, Modality

SEX, DIAGNOSIS = "sex", "diagnosis"
FROM_HEADER = (AGE, SEX)
"""Attributes that a DICOM header may supply where the tables do not."""
ALIASES = {
    AGE: (AGE, "age_years", "age_at_scan", "age_at_visit", "ageatscan"),
    SEX: (SEX, "gender"),
    DIAGNOSIS: (DIAGNOSIS, "dx", "group", "condition"),
}
"""Names of an attribute's column, the first that a table has is read; other attributes have their own name only."""
IMAGES = (".nii", ".nii.gz", ".png", ".jpg", ".jpeg", ".dcm", ".ima", ".mgz", ".img", ".hdr", ".tif", ".tiff")
REPORTED = 500
"""Files or rows between two reports of progress."""
Progress = Callable[[str, int, int], None]
"""Called with a stage, the items done and all items."""


@dataclass
class LayoutImport:
    """One run of an importer."""

    options: LayoutOptions
    progress: Progress = lambda *_: None
    visits: list[LayoutVisit] = field(default_factory=list)
    left_out: list[UnusedScan] = field(default_factory=list)
    contradictions: list[SourceConflict] = field(default_factory=list)
    statements: list[str] = field(default_factory=list)
    """What was read and by which rules, a line each."""
    words: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """Attribute, word of the tables, value ("" for none) -> number of scans."""
    vocabulary: dict[str, dict[str, str]] = field(default_factory=dict)
    """Words of the layout, in lower case: attribute -> word -> value."""
    series: tuple[tuple[str, ...], ...] = (("*",),)
    """Patterns of the scans that are taken, the preferred ones first."""
    unnamed: tuple[Cause, str] = (Cause.NOT_IN_LAYOUT, "the layout has no scan of this name")
    """What becomes of images that the importer did not explain."""
    sources: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """Attribute -> (table, column), the preferred one first."""
    in_header: bool = False
    """Whether DICOM headers may supply age and sex."""
    _explained: set[str] = field(default_factory=set)
    _by_file: dict[str, LayoutVisit | None] = field(default_factory=dict)
    _contradicted: set[tuple[Conflict, str]] = field(default_factory=set)

    @property
    def root(self) -> Path:
        """Folder of the scans."""
        return self.options.root

    @property
    def modality(self) -> Modality:
        """The modality whose attributes are looked for."""
        return self.options.modality

    @functools.cached_property
    def files(self) -> list[str]:
        """Every file under the root, relative to it, in a fixed order; hidden ones are not looked at."""
        paths: list[str] = []
        hidden = 0
        for folder, folders, names in os.walk(self.root, onerror=self._leave_out_folder):
            hidden += sum(name.startswith(".") for name in (*folders, *names))
            base = "" if Path(folder) == self.root else Path(folder).relative_to(self.root).as_posix() + "/"
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in folders:
                if (Path(folder) / name).is_symlink():
                    self.leave_out(base + name, Cause.UNREADABLE, "a link to a folder is not followed: give the folder")
            paths += [base + name for name in names if not name.startswith(".")]
        if hidden:
            self.state(f"{hidden} hidden files and folders are not looked at")
        return sorted(paths)

    def _leave_out_folder(self, error: OSError) -> None:
        folder = Path(error.filename).relative_to(self.root).as_posix()
        self.leave_out(folder, Cause.UNREADABLE, f"the folder cannot be read: {error.strerror}")

    def each(self, stage: str, names: Sequence[str]) -> Iterator[str]:
        """These names, with progress."""
        for done, name in enumerate(names, start=1):
            yield name
            if done % REPORTED == 0 or done == len(names):
                self.progress(stage, done, len(names))

    def state(self, line: str) -> None:
        """Add a rule or source to the summary, once."""
        if line not in self.statements:
            self.statements.append(line)

    def leave_out(self, name: str, cause: Cause, detail: str, files: int = 1, rows: int = 0) -> None:
        """Say that a file, or with `rows` a row, becomes no visit."""
        self._explained.add(name)
        self.left_out.append(UnusedScan(name, 0 if rows else files, rows, cause, detail))

    def contradict(self, kind: Conflict, patient: str, detail: str) -> None:
        """Note a contradiction, once a patient and kind."""
        if (kind, patient) not in self._contradicted:
            self._contradicted.add((kind, patient))
            self.contradictions.append(SourceConflict(kind, patient, detail))

    def explain(self, names: Iterable[str]) -> None:
        """Say that these files need no line of their own: tables that are read, slices of a series."""
        self._explained.update(names)

    def leave_out_the_rest(self) -> None:
        """A line for every file that the importer did not explain."""
        for name in self.files:
            if name not in self._explained:
                cause = self.unnamed if name.lower().endswith(IMAGES) else (Cause.NOT_A_SCAN, "")
                self.leave_out(name, *cause)

    def use_series(self, *default: str) -> None:
        """Take scans by `--series`, or else by the layout's own patterns, none of which is preferred."""
        given = self.options.series
        self.series = tuple((pattern,) for pattern in given) if given else (default,)
        patterns = ", then ".join(given) if given else ", ".join(default)
        if patterns != "*":
            self.state(f"scans: {patterns}" + ("" if given else " (--series replaces it)"))

    def tier(self, file: str, series: str = "") -> int | None:
        """Which of the patterns a scan matches first, by its series, its file's name or, with a slash, its path."""
        names = {name.lower() for name in (file.rpartition("/")[2], series) if name}
        for place, patterns in enumerate(self.series):
            for pattern in map(str.lower, patterns):
                if any(fnmatch.fnmatchcase(name, pattern) for name in ({file.lower()} if "/" in pattern else names)):
                    return place
        return None

    def add(self, visit: LayoutVisit) -> None:
        """Add a scan whose attributes are known; a file that is missing, or stands in two rows, is left out."""
        if not visit.file:
            self.visits.append(visit)
            return
        path = self.root / visit.file
        self._explained.add(visit.file)
        if not path.exists():
            broken = path.is_symlink()
            detail = "a link to nowhere: fetch its content, for example by datalad get" if broken else "a row names it"
            self.leave_out(visit.file, Cause.NOT_FETCHED if broken else Cause.NO_FILE, detail, 1, int(not broken))
        elif visit.file in self._by_file:
            self._add_again(visit)
        else:
            self.visits.append(visit)
            self._by_file[visit.file] = visit

    def _add_again(self, visit: LayoutVisit) -> None:
        earlier = self._by_file[visit.file]
        if earlier is not None and vars(earlier) == vars(visit):
            self.leave_out(visit.file, Cause.DUPLICATE, "two equal rows name it: one counts", 0, 1)
            return
        if earlier is not None:
            self.visits.remove(earlier)
            self._by_file[visit.file] = None
            self.leave_out(visit.file, Cause.CONFLICT, "two rows name it and disagree: keep the right one")
        self.leave_out(visit.file, Cause.CONFLICT, "two rows name it and disagree: keep the right one", 0, 1)

    def read(self, table: LayoutTable, kind: str, *columns: str) -> Iterator[LayoutRow]:
        """The usable rows of a table, with `columns` and those of its attributes; the others are left out.

        `kind` is its name in `sources`.
        """
        self.explain_table(table)
        length = table.length()
        attributes = [column for found in self.sources.values() for name, column in found if name == kind]
        for row in table.rows([*columns, *attributes]):
            if length and row.number % REPORTED == 0:
                self.progress(f"reading {table.name}", row.number, max(length, row.number))
            if row.problem:
                self.leave_out(f"{table.name} row {row.number}", Cause.BAD_ROW, row.problem, rows=1)
            else:
                yield row

    def explain_table(self, table: LayoutTable) -> None:
        """Say that a table under the root is read."""
        path, root = table.path.resolve(), self.root.resolve()
        if path.is_relative_to(root):
            self.explain([path.relative_to(root).as_posix()])

    def find_table(
        self, what: str, patterns: Sequence[str], columns: Sequence[str], any_name: bool = False
    ) -> LayoutTable | None:
        """The table that has `columns`: of those given by --table, or else of that name in the root or beside it.

        With `any_name`, files that only may be it are passed over where they cannot be read.

        Raises:
            TableError: several tables fit, or one of that name cannot be read.
        """
        paths = [*self.options.tables]
        if not paths:
            names = sorted(path for folder in (self.root, self.root.parent) for path in folder.iterdir())
            paths = [path for path in names if path.is_file() and _matches(path.name, patterns)]
        tables: list[LayoutTable] = []
        for path in dict.fromkeys(paths):
            with contextlib.suppress(*[TableError] * (any_name and not self.options.tables)):
                tables += [table for table in [find_header(path)] if table.has(columns)]
        if len(tables) > 1:
            names_found = ", ".join(f"'{table.path}'" for table in tables)
            raise TableError(f"several tables could be the {what}: {names_found}; name each table to read by --table")
        return tables[0] if tables else None

    def need_table(self, what: str, patterns: Sequence[str], columns: Sequence[str]) -> LayoutTable:
        """`find_table`, or a `TableError` that says what is missing."""
        table = self.find_table(what, patterns, columns)
        if table is None:
            where = "none of --table" if self.options.tables else f"no {' or '.join(patterns)} in the root or beside it"
            raise TableError(f"the {what} is missing: {where} has the columns {', '.join(columns)}; use --table FILE")
        return table

    def find_attributes(self, tables: Mapping[str, Sequence[str]], computed: Iterable[str] = ()) -> None:
        """Find the column of each attribute of the modality.

        Args:
            tables: header by the name of each table, the preferred table first.
            computed: attributes that the importer finds itself.

        Raises:
            ConfigError: an attribute without a column, or a column of --column that no table has.
        """
        computed = set(computed)
        for attribute in self.modality.attributes:
            wanted = self.options.columns.get(attribute, "")
            names = (wanted,) if wanted else ALIASES.get(attribute, (attribute,))
            found = [(name, column) for name, header in tables.items() if (column := _column(header, names))]
            if wanted and not found:
                known = [column for header in tables.values() for column in header]
                require(False, f"no table has the column '{wanted}' of --column {attribute}: {nearest(wanted, known)}")
            taken = attribute in computed and not wanted
            if attribute in self.options.constants:
                require(not found and not taken, f"--value {attribute}: the tables say it; leave the option out")
                self.state(f"{attribute}: {self.options.constants[attribute]} for every visit, by --value")
            elif not taken:
                self.sources[attribute] = found
                self._state_source(attribute, found)

    def _state_source(self, attribute: str, found: Sequence[tuple[str, str]]) -> None:
        if found:
            self.state(f"{attribute}: " + ", then ".join(f"column '{column}' of {name}" for name, column in found))
            return
        header = self.in_header and attribute in FROM_HEADER
        require(
            header,
            f"no table has a column for '{attribute}', which {self.modality.name} needs: "
            f"--column {attribute}=COLUMN names one, --value {attribute}=VALUE sets it for every visit",
        )
        self.state(f"{attribute}: from the DICOM headers, by ld-client index")

    def attributes(
        self, visit: str, patient: str, rows: Mapping[str, LayoutRow], computed: Mapping[str, str], files: int = 1
    ) -> dict[str, str] | None:
        """A visit's attributes; None where one is missing or unknown, and then the scan is left out.

        Args:
            visit: its file.
            patient: its patient.
            rows: the visit's row of each table.
            computed: words of the attributes that the importer found itself.
            files: number of the scan's files.
        """
        values: dict[str, str] = dict(self.options.constants)
        for name in self.modality.attributes:
            if name in values:
                continue
            words = [computed[name]] if name in computed and name not in self.sources else self._words(name, rows)
            problem = self._take(name, patient, words, values)
            if problem is not None:
                self.leave_out(visit, *problem, files=files)
                return None
        return values

    def _words(self, name: str, rows: Mapping[str, LayoutRow]) -> list[str]:
        cells = [rows[table].get(column) for table, column in self.sources.get(name, ()) if table in rows]
        known = self.options.words.get(name, {})
        return [cell for cell in cells if not is_blank(cell) or cell.lower() in known]

    def _take(self, name: str, patient: str, words: Sequence[str], values: dict[str, str]) -> tuple[Cause, str] | None:
        """Put the value of the first word into `values`, or return the problem."""
        known = self.options.words.get(name, {})
        if not words or (is_blank(words[0]) and words[0].lower() not in known):
            if self.in_header and name in FROM_HEADER:
                values[name] = ""
                return None
            return Cause.MISSING_VALUE, f"no {name}"
        extra = {**self.vocabulary.get(name, {}), **known}
        kind = self.modality.attributes[name]
        found = [value_of(name, kind, word, extra) for word in words]
        if kind.categories:
            self.words[name, words[0], found[0][0]] += 1
        if name == SEX and len({value for value, _ in found if value}) > 1:
            detail = f"the tables say {' and '.join(words)}"
            self.contradict(Conflict.SEX_TABLES, patient, detail)
            return Cause.CONFLICT, detail
        value, problem = found[0]
        if problem:
            return (Cause.OUT_OF_RANGE if value else Cause.UNKNOWN_VALUE), problem
        values[name] = value
        return None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)


def _column(header: Sequence[str], names: Sequence[str]) -> str:
    """The first of `names` that the header has, as the header spells it; empty if none."""
    known = {column.lower(): column for column in header}
    return next((known[name.lower()] for name in names if name.lower() in known), "")
