"""Tables that others made, read line by line within limits."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_LINES, MAX_LINE, MAX_CHARACTERS = 500_000, 2**20, 2**26


@contextmanager
def table_lines(path: Path) -> Iterator[Iterator[str]]:
    """The lines of a CSV or TSV file for `csv.reader`, without a byte order mark.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is not UTF-8.
        csv.Error: it has more than `MAX_LINES` lines, `MAX_LINE` characters in one, or `MAX_CHARACTERS` in all.
    """
    with path.open(encoding="utf-8-sig", newline="") as stream:

        def lines() -> Iterator[str]:
            characters = number = 0
            while line := stream.readline(MAX_LINE + 1):
                characters, number = characters + len(line), number + 1
                if len(line) > MAX_LINE:
                    raise csv.Error(f"line {number} is longer than the {MAX_LINE} characters that are read")
                if number > MAX_LINES or characters > MAX_CHARACTERS:
                    raise csv.Error(f"more than {MAX_LINES} lines or {MAX_CHARACTERS} characters: split it")
                yield line

        yield lines()
