"""Tables that others made, read row by row within limits.

Every reader of tables uses `open_table`, so that all follow the same rules:

- Text is UTF-8, or UTF-16 with a byte order mark. Another encoding is never guessed: bytes that are not UTF-8 make the
  cell that holds them unusable, not the table, unless the caller names the encoding.
- Cells are separated by the one of `SEPARATORS` that splits the header, and into as many cells as the first rows.
- A number may have a decimal comma where the comma separates no cells (`decimal_point`).
- A row with more cells than the header cannot be used: nobody knows which cell was split.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ld_common.core.errors import LdError, TableError

MAX_LINES, MAX_LINE, MAX_CHARACTERS = 500_000, 2**20, 2**26
SEPARATORS = ",;\t|"
SAMPLED_LINES = 20
"""Lines that the separator is found by."""
EXCEL, OPEN_DOCUMENT = "an Excel workbook: save it as CSV", "an OpenDocument spreadsheet: save it as CSV"
ARCHIVE = "a zip archive: unpack it"
OLD_EXCEL = ".xls"
FOREIGN_SUFFIXES = {".xlsx": EXCEL, ".xlsm": EXCEL, ".xlsb": EXCEL, OLD_EXCEL: EXCEL, ".ods": OPEN_DOCUMENT}
"""What a file is that is no text, where its content does not tell."""
FOREIGN_CONTENT = {
    rb"PK\x03\x04.*(vnd\.oasis|opendocument)": OPEN_DOCUMENT,
    rb"PK\x03\x04.*(\[Content_Types\]\.xml|xl/)": EXCEL,
    rb"PK\x03\x04.{22}(?!\x00\x00)": ARCHIVE,  # its first member has a name
    rb"PK(\x03\x04|\x05\x06|\x07\x08)": EXCEL + ", or unpack it if it is a zip archive",
    rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": EXCEL,
    rb"\x1f\x8b": "compressed by gzip: unpack it",
    rb"BZh\d1AY&SY": "compressed by bzip2: unpack it",
    rb"\xfd7zXZ\x00": "compressed by xz: unpack it",
    rb"\$FL[23]@\(#\)": "an SPSS file: export it as CSV",
    rb"PAR1": "a Parquet file: export it as CSV",
    rb"ARROW1": "an Arrow file: export it as CSV",
    rb"<stata_dta>": "a Stata file: export it as CSV",
    rb"SQLite format 3\x00": "an SQLite database: export the table as CSV",
    rb"%PDF-": "a PDF: export the table as CSV",
    rb"(\xef\xbb\xbf)?\s*<(!doctype|html|table|\?xml)": "an HTML or XML page: save it as CSV",
}
"""What a file is whose first bytes match; the first that fits."""
SNIFFED_BYTES = 4096
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""In this order: a mark of UTF-32 begins like one of UTF-16."""
ASCII_PROBE = b'az,;\t|"\n09 \\x41 +AGE- ~{.xn--mnchen-3ya.&'
"""Bytes that mean the same in ASCII and in every encoding that extends it."""
EXCEL_SEPARATOR = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
"""A first line that tells Excel the separator."""
DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")
THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2},\d{3}")
NOT_UTF_8 = "has characters that are not UTF-8: save the table as UTF-8"


@dataclass(frozen=True)
class Row:
    """A row of a table with something in it."""

    number: int
    """The header is 1."""
    cells: dict[str, str]
    """By column, without white space round them; "" where the row is shorter than the header."""
    surplus: bool = False
    """Whether there are cells beyond the last column, other than empty ones."""

    def problem(self, columns: Iterable[str]) -> str:
        """Why these columns of the row cannot be used, as the rest of a sentence; empty where they can."""
        if self.surplus:
            return 'the row has more cells than columns: put quotes round a cell that holds the separator, as in "74,5"'
        unreadable = next((name for name in columns if not _is_text(self.cells.get(name, ""))), None)
        return "" if unreadable is None else f"the cell of '{unreadable}' {NOT_UTF_8}"


@dataclass(frozen=True)
class OpenTable:
    """A table's header and rows; the rows can be read once."""

    header: list[str]
    """Names of the columns, without white space round them; characters that are not UTF-8 are replaced."""
    separator: str
    rows: Iterator[Row]
    """Without those whose cells are all empty."""

    def twice(self, columns: Iterable[str]) -> list[str]:
        """Which of these columns the header has more than once."""
        return sorted({name for name in columns if self.header.count(name) > 1})

    @property
    def is_utf_8(self) -> bool:
        """Whether the header is."""
        return "\N{REPLACEMENT CHARACTER}" not in "".join(self.header)


@contextmanager
def open_table(
    path: Path, kind: type[LdError] = TableError, encoding: str = "", columns: Collection[str] = ()
) -> Iterator[OpenTable]:
    """Open a table.

    Args:
        path: a CSV or TSV file.
        kind: class of the errors raised, for the file and for its rows.
        encoding: of the text; by default UTF-8, or UTF-16 with a byte order mark.
        columns: columns that the header may have only once, because they are read.

    Raises:
        kind: the file cannot be read, is no table, passes a limit, or has one of `columns` twice.
    """
    with ExitStack() as stack:
        with _reading(path, kind):
            lines = stack.enter_context(table_lines(path, encoding))
            first = list(itertools.islice(lines, SAMPLED_LINES))
            stated = EXCEL_SEPARATOR.fullmatch(first[0]) if first else None
            if stated:
                first = first[1:]
            separator = stated[1] if stated and stated[1] in SEPARATORS else _separator(first)
            reader = csv.reader(itertools.chain(first, lines), delimiter=separator, strict=True)
            header = [readable(cell.strip()) for cell in next(reader, [])]
        while header and not header[-1]:
            header.pop()
        table = OpenTable(header, separator, _rows(path, kind, reader, header))
        if twice := table.twice(columns):
            raise kind(f"the table '{path}' has column '{twice[0]}' more than once: rename one")
        yield table


@contextmanager
def table_lines(path: Path, encoding: str = "") -> Iterator[Iterator[str]]:
    """The lines of a CSV or TSV file for `csv.reader`, without a byte order mark.

    Bytes that are not UTF-8 become lone surrogates, as by `surrogateescape`.

    Raises:
        OSError: the file cannot be read.
        UnicodeError: it is not of the given encoding, or not of that of its byte order mark.
        csv.Error: it is no table but, for example, an Excel workbook, or has more than `MAX_LINES` lines, `MAX_LINE`
            characters in one, or `MAX_CHARACTERS` in all.
    """
    with path.open("rb") as stream:
        head = stream.read(SNIFFED_BYTES)
        stream.seek(0)
        if what := _foreign(path, head):
            raise csv.Error(what)
        marked = next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), "")
        errors = "strict" if encoding or marked.startswith(("utf-16", "utf-32")) else "surrogateescape"
        text = io.TextIOWrapper(stream, marked or encoding or "utf-8", errors, newline="")

        def lines() -> Iterator[str]:
            characters = number = 0
            while line := text.readline(MAX_LINE + 1):
                characters, number = characters + len(line), number + 1
                if len(line) > MAX_LINE:
                    raise csv.Error(f"line {number} is longer than the {MAX_LINE} characters that are read")
                if number > MAX_LINES or characters > MAX_CHARACTERS:
                    raise csv.Error(f"more than {MAX_LINES} lines or {MAX_CHARACTERS} characters: split it")
                if "\0" in line:
                    raise csv.Error(f"line {number} holds NUL characters: save it as UTF-8")
                yield line

        yield lines()


def is_encoding(name: str) -> bool:
    """Whether Python knows an encoding, and it extends ASCII, as `windows-1252` and `gb18030` do."""
    try:
        return ASCII_PROBE.decode(name) == ASCII_PROBE.decode("ascii")
    except (LookupError, ValueError):
        return False


def decimal_point(cell: str, separator: str) -> str:
    """A number with its decimal comma as a point; any other text as it is.

    Where commas separate, only a cell in quotes holds one. Unless semicolons separate, `1,234` may as well be a number
    of thousands and stays as it is.
    """
    if not DECIMAL_COMMA.fullmatch(cell):
        return cell
    if separator != ";" and THOUSANDS.fullmatch(cell):
        return cell
    return cell.replace(",", ".")


def readable(text: str) -> str:
    """A text with a replacement character for each byte that is not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _is_text(cell: str) -> bool:
    try:
        cell.encode()
    except UnicodeEncodeError:
        return False
    return True


def _foreign(path: Path, head: bytes) -> str:
    """What a file is that is no text, and the way out; empty for a text."""
    matches = (what for pattern, what in FOREIGN_CONTENT.items() if re.match(pattern, head, re.IGNORECASE | re.DOTALL))
    what = next(matches, "")
    by_name = FOREIGN_SUFFIXES.get(path.suffix.lower(), "")
    is_text = path.suffix.lower() == OLD_EXCEL and b"\0" not in head  # many programs name their tables so
    return by_name if what in ("", ARCHIVE) and not is_text and by_name else what


def _separator(lines: Sequence[str]) -> str:
    """The separator that splits the header, into as many cells as most of the rows."""
    return max(SEPARATORS, key=lambda separator: _agreement(lines, separator))


def _agreement(lines: Sequence[str], separator: str) -> tuple[bool, int, int]:
    """Whether a separator splits the header, in how many rows it gives as many cells, and how many those are."""
    widths: list[int] = []
    with suppress(csv.Error):  # a cell is too large: the reader says so
        widths.extend(len(cells) for cells in csv.reader(lines, delimiter=separator) if cells)
    header = widths[0] if widths else 0
    return header > 1, widths[1:].count(header), header


def _rows(path: Path, kind: type[LdError], reader: Any, header: Sequence[str]) -> Iterator[Row]:
    for number in itertools.count(2):
        start = reader.line_num + 1
        with _reading(path, kind, f", the row that begins in line {start}"):
            line = next(reader, None)
        if line is None:
            return
        cells = [cell.strip() for cell in line]
        if any(cells):
            named = dict(zip(header, itertools.chain(cells, itertools.repeat("")), strict=False))
            yield Row(number, named, any(cells[len(header) :]))


@contextmanager
def _reading(path: Path, kind: type[LdError], where: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise kind(f"cannot read the table '{path}': {error.strerror or error}") from error
    except UnicodeError as error:
        raise kind(f"cannot read the table '{path}'{where}: {error}: save it as UTF-8") from error
    except csv.Error as error:
        raise kind(f"cannot read the table '{path}'{where}: {error}") from error
