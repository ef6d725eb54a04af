"""Finds scans by patterns of their paths, and the file nearest to a path that is none.

A pattern is a path with names in braces, `*` (anything but a slash) and `**/` (any number of folders).
"""

from __future__ import annotations

import difflib
import functools
import glob
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from ld_client.data_config import PLACEHOLDER

TOKEN = re.compile(r"(\{[^{}]+\}|\*\*/|\*)")
GROUP = "([^/]+?)"
LONGEST_TEXT = 4096
"""Characters of a text that is compared with a pattern; no path is longer."""
ENDINGS = (".nii.gz", ".nii", ".png", ".jpg", ".jpeg", ".dcm", ".dicom", ".ima", ".mgz", ".mgh", ".hdr", ".img")
MOST_COMPARED = 50
"""Files of equal rank whose spelling is compared."""


def placeholders(pattern: str) -> list[str]:
    """The names in braces."""
    return PLACEHOLDER.findall(pattern)


def extract(pattern: str, text: str) -> dict[str, str] | None:
    """What a text has in the place of each name; None where it does not fit the pattern."""
    matched = _expression(pattern).fullmatch(text) if len(text) <= LONGEST_TEXT else None
    return dict(zip(placeholders(pattern), matched.groups(), strict=True)) if matched else None


def files_of_row(root: Path, pattern: str, cells: Mapping[str, str]) -> list[str]:
    """Files that match a pattern whose names stand for cells: paths relative to the root, sorted."""
    parts = []
    for token in _tokens(pattern):
        column = PLACEHOLDER.fullmatch(token)
        parts.append(token if token in ("*", "**/") else glob.escape(cells[column[1]] if column else token))
    return _files(root, "".join(parts))


class FileNames:
    """Existing files, among which the nearest to a path is found that names none of them."""

    def __init__(self, existing: Iterable[str]) -> None:
        """Index paths relative to the data's root, POSIX form."""
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for file in existing:
            self._by_stem[_stem(file)].append(file)

    def nearest(self, name: str) -> str:
        """The file of the same name, case and suffix apart, with the most folders in common; empty without one."""
        candidates = self._by_stem.get(_stem(name), [])
        most = max((_common_end(file, name) for file in candidates), default=0)
        best = [file for file in candidates if _common_end(file, name) == most][:MOST_COMPARED]
        return max(best, key=lambda file: difflib.SequenceMatcher(None, file, name).ratio(), default="")


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    parts = {"*": "[^/]*", "**/": "(?:[^/]+/)*"}
    texts = (
        parts.get(token, GROUP if PLACEHOLDER.fullmatch(token) else re.escape(token)) for token in _tokens(pattern)
    )
    return re.compile("".join(texts), re.DOTALL)


def _tokens(pattern: str) -> list[str]:
    return [token for token in TOKEN.split(pattern) if token]


def _files(root: Path, pattern: str) -> list[str]:
    path = PurePosixPath(pattern)
    if not path.parts or path.is_absolute() or ".." in path.parts or len(pattern) > LONGEST_TEXT:
        return []
    try:
        names = [found.relative_to(root).as_posix() for found in root.glob(path.as_posix()) if found.is_file()]
    except OSError:  # a name that is too long
        return []
    return sorted(name for name in names if not any(part.startswith(".") for part in PurePosixPath(name).parts))


def _stem(file: str) -> str:
    """The last part of a path in small letters, without the ending of an image."""
    name = PurePosixPath(file).name.casefold()
    ending = next((ending for ending in ENDINGS if name.endswith(ending)), "")
    return name.removesuffix(ending)


def _common_end(first: str, second: str) -> int:
    """How many folders two paths have in common, from the end."""
    folders = (reversed(PurePosixPath(path.casefold()).parts[:-1]) for path in (first, second))
    count = 0
    for one, other in zip(*folders, strict=False):
        if one != other:
            break
        count += 1
    return count
