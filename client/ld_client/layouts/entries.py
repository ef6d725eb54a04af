"""What an import is made of: its options, visits, what is left out and why, and contradictions."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from ld_client.layouts.labels import FindingLabel
from ld_common.imaging.modality import Modality


class Cause(StrEnum):
    """Why a file or a row became no visit."""

    AMBIGUOUS = "several scans of one visit"
    OTHER_SERIES = "another scan of the visit was taken"
    NOT_SELECTED = "another kind of scan"
    DERIVATIVE = "derived file"
    OTHER_VIEW = "another view"
    NO_VIEW = "view not given"
    NO_DATE = "no date or day"
    NOT_CHOSEN = "another visit of the patient was taken"
    NO_SCAN = "row without a scan"
    NO_FILE = "file not found"
    NOT_FETCHED = "file without content"
    NO_ROW = "no table row"
    TOO_FAR = "no table row near enough"
    MISSING_VALUE = "missing value"
    UNKNOWN_VALUE = "value not known"
    OUT_OF_RANGE = "value out of range"
    UNCERTAIN = "uncertain label"
    NO_LABEL = "no label"
    CONFLICT = "tables, rows or labels that disagree"
    DUPLICATE = "duplicate"
    BAD_ROW = "row that does not fit its header"
    UNREADABLE = "file that cannot be used"
    NOT_IN_LAYOUT = "image outside the layout"
    NOT_A_SCAN = "not a scan"


class Conflict(StrEnum):
    """Kinds of contradictions between sources or visits, each counted in patients."""

    AGE_FALLS = "age goes down from a visit to a later one"
    AGE_STANDS = "the same age at visits more than 400 days apart"
    AGE_PACE = "age and time between visits differ by more than 1.5 years"
    AGE_TABLES = "two tables give ages more than 1.5 years apart"
    SEX_CHANGES = "sex changes over the visits"
    SEX_TABLES = "two sexes in the tables"
    SESSION_ORDER = "dates run against the session numbers"
    DATES = "two tables give one scan dates more than a day apart"
    NAMES = "the names of folder and file disagree"
    SEVERITY = "diagnosis and CDR disagree"
    SAME_FILE = "one file stands for two visits"


@dataclass(frozen=True)
class UnusedScan:
    """A file, series or row that became no visit. It names files of the site and never leaves it."""

    name: str
    """Path relative to the root, or `participants.tsv row 12`."""
    files: int
    rows: int
    cause: Cause
    detail: str


@dataclass(frozen=True)
class SourceConflict:
    """Two sources, or two visits of a patient, that cannot both be right. It names the patient."""

    kind: Conflict
    patient: str
    detail: str


@dataclass(eq=False)
class LayoutVisit:
    """A scan that could be a visit; `settle` takes one of each visit."""

    patient: str
    file: str
    """Path relative to the root of a file, or of a folder that holds one DICOM series; empty: matched by header."""
    attributes: dict[str, str]
    """Values of the modality; empty where the DICOM header supplies them."""
    date: datetime.date | None = None
    day: int | None = None
    """Days since the patient's entry."""
    label: str = ""
    """Name of a visit that may have no date, such as a session, or of a scan without a file of its own."""
    order: int | None = None
    """Position among the patient's visits, of a layout that has neither dates nor days."""
    series: str = ""
    """Description that `--series` may name, beside the file's path."""
    rank: int = 0
    """Of several scans of a visit that `--series` does not tell apart, the one of the lowest rank is taken."""
    files: int = 1
    age_of_patient: bool = False
    """Whether the age stands once for the patient, not for each visit."""

    @property
    def when(self) -> int | None:
        """Days on the patient's own scale."""
        return self.date.toordinal() if self.date is not None else self.day

    @property
    def name(self) -> str:
        """How the visit is called in lists."""
        return self.file or self.label


@dataclass(frozen=True)
class LayoutOptions:
    """What the data manager gave."""

    root: Path
    modality: Modality
    tables: tuple[Path, ...] = ()
    series: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    """Attribute (or `patient`, `date`, `day`) -> column."""
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Attribute -> word of the tables, in lower case -> value of the modality."""
    constants: Mapping[str, str] = field(default_factory=dict)
    """Attribute -> value of every visit."""
    labels: tuple[FindingLabel, ...] = ()
    tolerance_days: int | None = None
    one_visit: str = ""
    baseline_age: bool = False
    pattern: str = ""
    date_format: str = ""
