"""Files and table rows that became no visit, each with a reason of a fixed vocabulary, so that they can be counted."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ld_client.data.store_index import open_index
from ld_common.imaging.rejection import Rejection


class Reason(StrEnum):
    """Why a file or a row of the table was excluded; the first are those of `Rejection`."""

    UNREADABLE = Rejection.UNREADABLE.value
    NOT_AN_IMAGE = Rejection.NOT_AN_IMAGE.value
    TOO_LARGE = Rejection.TOO_LARGE.value
    WRONG_MODALITY = Rejection.WRONG_MODALITY.value
    WRONG_GEOMETRY = Rejection.WRONG_GEOMETRY.value
    UNSUPPORTED = Rejection.UNSUPPORTED.value
    NO_DECODER = Rejection.NO_DECODER.value
    BURNED_IN = Rejection.BURNED_IN.value
    SYNTHETIC = Rejection.SYNTHETIC.value
    LOCALIZER = Rejection.LOCALIZER.value
    SEVERAL_AT_ONE_PLACE = Rejection.SEVERAL_AT_ONE_PLACE.value
    MISSING_SLICE = Rejection.MISSING_SLICE.value
    NO_ORIENTATION = Rejection.NO_ORIENTATION.value
    NO_CONTRAST = "no contrast"
    NO_PATIENT_OR_DATE = "no patient or date"
    NO_TABLE_ROW = "no table row"
    NO_SCAN = "no scan"
    MISSING_VALUE = "missing value"
    UNKNOWN_VALUE = "value not known"
    OUT_OF_RANGE = "value out of range"
    DUPLICATE = "duplicate"
    CONFLICTING_ROWS = "conflicting rows"
    BROKEN_ROW = "broken table row"
    ROW_NOT_SELECTED = "table row not selected"
    SEVERAL_FILES = "several files match"
    CONTRADICTION = "contradiction"
    CONSENT_WITHDRAWN = "consent withdrawn"
    SEVERAL_SERIES = "several series fit"
    OTHER_SERIES = "another series of the visit"
    NOT_SELECTED = "series not selected"


@dataclass(frozen=True)
class Exclusion:
    """One file, series or table row that became no visit. It names files of the site and never leaves it."""

    name: str
    """Path relative to the data's root (of a series: its first file), or `row 12` of the table."""
    files: int
    """Number of files it stands for; 0 for a row."""
    reason: Reason
    detail: str


def read_exclusions(folder: Path) -> list[Exclusion]:
    """The exclusions of the last index run; raises `StoreError` without a store."""
    with open_index(folder) as index:
        rows = index.execute("SELECT name, files, reason, detail FROM exclusions ORDER BY rowid").fetchall()
        return [Exclusion(name, files, Reason(reason), detail) for name, files, reason, detail in rows]
