"""Tables of public layouts, CSV or TSV, also compressed by gzip as PhysioNet has them."""

from __future__ import annotations

import contextlib
import gzip
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ld_common.core.errors import TableError
from ld_common.core.tables import OpenTable, open_table

MAX_UNPACKED = 2**28
"""Bytes of a compressed table that are unpacked; more than `open_table` reads in characters."""

LONG = 2**20
"""Bytes."""


@dataclass(frozen=True)
class LayoutRow:
    """One row of a table."""

    number: int
    """The header is 1."""
    cells: Mapping[str, str]
    """By the column's name in lower case."""
    problem: str = ""
    """Why the row cannot be used; empty where it can."""

    def get(self, column: str) -> str:
        """A cell, by the column's name in any case; empty if there is none."""
        return self.cells.get(column.lower(), "")


@dataclass(frozen=True)
class LayoutTable:
    """A table's place and header."""

    path: Path
    header: tuple[str, ...]

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    def has(self, columns: Sequence[str]) -> bool:
        """Whether all these columns are there, in any case."""
        return {column.lower() for column in columns} <= {column.lower() for column in self.header}

    def length(self) -> int:
        """Number of lines of a table that takes a while to read, for its progress; 0 for any other."""
        if self.path.suffix.lower() == ".gz" or self.path.stat().st_size < LONG:
            return 0
        with self.path.open("rb") as stream:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(2**20), b""))

    def rows(self, columns: Iterable[str]) -> Iterator[LayoutRow]:
        """Every row that is not blank; `columns`, in any case, are those that are read. Raises `TableError`."""
        wanted = {column.lower() for column in columns}
        read = [column for column in self.header if column.lower() in wanted]
        with _opened(self.path) as table:
            for row in table.rows:
                cells = {column.lower(): row.cells[column] for column in read}
                yield LayoutRow(row.number, cells, row.problem(read))


def find_header(path: Path) -> LayoutTable:
    """A table's header; raises `TableError`."""
    with _opened(path) as table:
        names = [name.lower() for name in table.header if name]
        twice = next((name for name in names if names.count(name) > 1), "")
        if twice:
            raise TableError(f"the table '{path}' has the column '{twice}' more than once: rename one of them")
        return LayoutTable(path, tuple(table.header))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[OpenTable]:
    if path.suffix.lower() != ".gz":
        with open_table(path) as table:
            yield table
        return
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder) / path.stem
        _unpack(path, unpacked)
        with open_table(unpacked) as table:
            yield table


def _unpack(path: Path, target: Path) -> None:
    """Unpack a table, which may unpack to more than the disk holds."""
    try:
        with gzip.open(path, "rb") as packed, target.open("wb") as stream:
            size = 0
            while chunk := packed.read(2**20):
                size += len(chunk)
                if size > MAX_UNPACKED:
                    raise TableError(f"the table '{path}' unpacks to more than the {MAX_UNPACKED} bytes that are read")
                stream.write(chunk)
    except (OSError, EOFError, zlib.error) as error:
        raise TableError(f"cannot unpack the table '{path}': {error}") from error
