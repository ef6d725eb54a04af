"""What an ingest leaves out and why: the reasons are a fixed vocabulary, so that they can be counted."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ld_common.imaging.rejection import Refusal


class Reason(StrEnum):
    """Why a file or a row of the table was left out; the first nine are `Refusal`'s."""

    UNREADABLE = Refusal.UNREADABLE.value
    NOT_AN_IMAGE = Refusal.NOT_AN_IMAGE.value
    TOO_LARGE = Refusal.TOO_LARGE.value
    WRONG_MODALITY = Refusal.WRONG_MODALITY.value
    WRONG_GEOMETRY = Refusal.WRONG_GEOMETRY.value
    UNSUPPORTED = Refusal.UNSUPPORTED.value
    NO_DECODER = Refusal.NO_DECODER.value
    BURNED_IN = Refusal.BURNED_IN.value
    SYNTHETIC = Refusal.SYNTHETIC.value
    NO_CONTRAST = "no contrast"
    NO_PATIENT_OR_DATE = "no patient or date"
    NO_TABLE_ROW = "no table row"
    NO_SCAN = "no scan"
    MISSING_VALUE = "missing value"
    UNKNOWN_VALUE = "value not known"
    OUT_OF_RANGE = "value out of range"
    DUPLICATE = "duplicate"
    CONFLICTING_ROWS = "conflicting rows"
    OTHER_SERIES = "another series of the visit"
    NOT_SELECTED = "series not selected"


@dataclass(frozen=True)
class Exclusion:
    """One file, series or table row that became no visit. It names files of the site and stays there."""

    name: str
    """Path relative to the data's root (of a series: its first file), or `row 12` of the table."""
    files: int
    """How many files it stands for; 0 for a row."""
    reason: Reason
    detail: str
