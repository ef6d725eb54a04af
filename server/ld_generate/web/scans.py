"""Files that were dropped on the page, and its examples, as paths that `read_scan` takes."""

from __future__ import annotations

import math
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ld_common.core.archives import archive_problem
from ld_common.core.config import is_number
from ld_common.core.errors import ConfigError, RequestError
from ld_common.core.tables import open_table
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.rejection import MAX_FILE_BYTES, Rejection, ScanRejected, rejecting
from ld_common.imaging.scan_table import agree, parse_cell, shown
from ld_generate.options import HistoryFile
from ld_generate.request import SUFFIXES

MAX_FILES = 4096
"""Per series."""
EXAMPLES_TABLE = "scans.csv"
"""Table in the folder of the examples: a column `input`, a path relative to it, and attributes."""


@dataclass(frozen=True)
class Example:
    """A scan that the page offers."""

    path: Path
    attributes: Attributes = field(default_factory=dict)
    """What the table of the examples says of it."""

    def contradictions(self, in_file: Attributes) -> list[str]:
        """A sentence for each attribute of which the table and the scan's file say different things."""
        return [
            f"{name} is {shown(in_file[name])} in the scan's file and {shown(value)} in {EXAMPLES_TABLE}"
            for name, value in self.attributes.items()
            if name in in_file and not agree(in_file[name], value)
        ]


def find_examples(folder: Path, modality: Modality) -> dict[str, Example]:
    """The scans below a folder by number: images, and folders with the DICOM slices of one volume.

    The page shows no file's name, which may be a patient's. What a table `scans.csv` in the folder says of a scan is
    filled in on the page; it may say nothing of some attributes or scans.

    Raises:
        ConfigError: there are none, or a value of the table is none of the modality's.
        RequestError: a table that cannot be read.
    """
    scans = set()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name.lower().endswith(SUFFIXES)):
        is_slice = modality.image.plane != "none" and file.suffix.lower() == ".dcm"
        scans.add(file.parent if is_slice else file)
    if not scans:
        raise ConfigError(f"--examples '{folder}' holds no scan: give a folder with {', '.join(SUFFIXES)} in it")
    listed = _listed(folder / EXAMPLES_TABLE, modality)
    return {
        f"example {number}": Example(path, listed.get(path.resolve(), {}))
        for number, path in enumerate(sorted(scans), 1)
    }


def _listed(table: Path, modality: Modality) -> dict[Path, Attributes]:
    """Attributes by scan, as far as a table says them; empty without a table."""
    if not table.exists():
        return {}
    listed: dict[Path, Attributes] = {}
    columns = ["input", *modality.attributes]
    with open_table(table, RequestError, columns=columns) as opened:
        for number, row in enumerate(opened.rows, 1):
            if problem := row.problem(columns):
                raise ConfigError(f"'{table}', row {number}: {problem}")
            try:
                attributes = {
                    name: parse_cell(modality, name, row.cells[name], opened.separator)
                    for name in modality.attributes
                    if row.cells.get(name)
                }
            except RequestError as error:
                raise ConfigError(f"'{table}', row {number}: {error}") from error
            listed[(table.parent / row.cells.get("input", "")).resolve()] = attributes
    return listed


def one_scan(files: Sequence[Path], folder: Path) -> Path:
    """The path of a single file; for several files or a .zip, a folder of one series, made inside `folder`.

    Raises:
        RequestError: no file, one that was deleted meanwhile, or an archive without a name.
        ScanRejected: an archive that is damaged or too large.
    """
    if not files:
        raise RequestError("there is no scan yet: drop one, or pick an example")
    if not all(file.exists() for file in files):
        raise RequestError("the server deleted this scan because it was not used for a while: drop it again")
    if len(files) == 1 and files[0].suffix.lower() != ".zip":
        return files[0]
    name = files[0].stem if len(files) == 1 else "series"
    if not name.strip("."):
        raise RequestError("this file's name is dots alone: rename it")
    series = folder / name
    series.mkdir()
    if len(files) == 1:
        return _unpacked(files[0], series)
    for number, file in enumerate(files):
        (series / f"{number:05d}.dcm").symlink_to(file.resolve())
    return series


def earlier_scans(files: Sequence[Path], ages: str) -> list[HistoryFile]:
    """Earlier scans of a patient with the ages of a text: in the order of the files, or empty where those have dates.

    Raises:
        RequestError: no age for each file, or one that is no number.
    """
    words = [word.strip() for word in ages.split(",")] if ages.strip() else [""] * len(files)
    if len(words) != len(files):
        raise RequestError(
            f"{len(words)} ages for {len(files)} earlier scans: give one a file, separated by commas, with a point in "
            "decimals"
        )
    for word in words:
        if word and not (is_number(word) and 0 <= float(word) < math.inf):
            raise RequestError(f"the age '{word}' of an earlier scan is no number of years")
    return [HistoryFile(path, float(word) if word else None) for path, word in zip(files, words, strict=True)]


def _unpacked(archive: Path, series: Path) -> Path:
    with rejecting(archive, zipfile.BadZipFile), zipfile.ZipFile(archive) as opened:
        problem = archive_problem(opened, MAX_FILE_BYTES, MAX_FILES)
        if problem is not None:
            raise ScanRejected(archive, Rejection.TOO_LARGE, f"the archive {problem}")
        members = [member for member in opened.infolist() if not member.is_dir()]
        for number, member in enumerate(members):
            # names inside an archive are not trusted
            with opened.open(member) as source, (series / f"{number:05d}.dcm").open("wb") as target:
                shutil.copyfileobj(source, target)
    return series
