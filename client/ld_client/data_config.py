"""How a site's own scans and tables are read: the part `data` of its configuration."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from omegaconf import MISSING

from ld_common.core.config import require
from ld_common.core.tables import is_encoding
from ld_common.imaging.modality import AGE


class Contradiction(StrEnum):
    """A kind of contradiction; `data.accept` names those whose visits are kept."""

    PATIENT = "patient"
    """The table and the scan's header name different patients."""
    DATE = "date"
    """The table and the header give different dates."""
    SEX = "sex"
    AGE = "age"
    SEX_OVER_VISITS = "sex-over-visits"
    """A patient's sex differs between visits."""
    AGE_OVER_VISITS = "age-over-visits"
    """A patient's ages and dates do not fit each other, for example as all ages are those at baseline."""
    ONE_SCAN = "one-scan"
    """One scan stands under two patients."""


YAML_WORDS = {
    True: ("yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"),
    False: ("no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"),
}
"""Words that YAML 1.1 reads as one of two values, unless they are quoted."""
PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
"""A name in a pattern."""


@dataclass
class ColumnsConfig:
    """Names of the table's columns; a column may also come from `data.joined` or `data.extract`."""

    patient: str = "patient"
    """Column with the patient's identifier, which for DICOM series is their PatientID."""
    date: str = "date"
    """Column with the visit's date. Empty for a table without dates: it has one visit of each patient. A column whose
    name has the word day or days may hold what `day` holds."""
    file: str = ""
    """Column with a scan's path relative to `data.root`; needed for NIfTI and PNG, unless `data.file_pattern` finds
    them. Empty when all scans are DICOM series, which are matched by PatientID and StudyDate."""
    attributes: dict[str, str] = field(default_factory=dict)
    """Attribute of the modality -> its column."""
    day: str = ""
    """Column with the days from the patient's entry to the visit (OASIS-3's `days_to_visit`), in place of `date`; a
    visit before entry has a negative number. The order of sessions alone is not enough: change is learnt per year."""
    age_at_baseline: str = ""
    """Column with the patient's age at baseline, the same in all rows of a patient (ADNIMERGE's `AGE`). The age of a
    visit is this plus the years since baseline, in place of an age in `attributes`."""
    baseline_date: str = ""
    """Column with the date of baseline (ADNIMERGE's `EXAMDATE_bl`); empty for the patient's first date in the table.
    With `day`, baseline is day 0."""

    def __post_init__(self) -> None:
        require(bool(self.patient), "data.columns.patient is empty: name the column with the patient's identifier")
        if self.day and self.date == "date":
            self.date = ""  # the default
        require(not (self.day and self.date), "data.columns has date and day: name one of them")
        timed = bool(self.date or self.day)
        require(timed or not self.age_at_baseline, "data.columns.age_at_baseline needs data.columns.date or day")
        fits = bool(self.age_at_baseline and self.date) or not self.baseline_date
        require(fits, "data.columns.baseline_date needs data.columns.age_at_baseline and date")
        once = not self.age_at_baseline or AGE not in self.attributes
        require(once, f"data.columns has age_at_baseline and attributes.{AGE}: name one of them")


@dataclass
class JoinedConfig:
    """A further table, whose columns are added to the rows of `data.table`."""

    table: str = MISSING
    """CSV or TSV file."""
    by: dict[str, str] = field(default_factory=dict)
    """Column of `data.table` -> the column of this table that holds the same (`{participant_id: participant_id}`). A
    row without a partner has empty cells; of a row with partners that disagree, the scan is excluded."""
    prefix: str = ""
    """Put before the names of this table's columns, to tell them from those of the same name in another table."""
    encoding: str = ""
    """As `data.encoding`."""

    def __post_init__(self) -> None:
        require(bool(self.by), "data.joined has no `by`: name the columns by which the tables belong together")
        _require_encoding("data.joined.encoding", self.encoding)


@dataclass
class RuleConfig:
    """One value of an attribute that several columns decide."""

    where: dict[str, Any] = field(default_factory=dict)
    """Column -> the cell, or a list of cells, of rows with this value. All columns must fit."""
    value: str = MISSING
    """The modality's value."""

    def __post_init__(self) -> None:
        require(bool(self.where), "a rule of data.rules has no `where`: name a column and its cells")
        self.where = _accepted("data.rules", self.where)


@dataclass
class SeriesConfig:
    """Which DICOM series, and which images of a series, are scans; all rules must fit. Patterns have `*` and ignore
    case; an empty one takes all."""

    description: str = ""
    """Pattern of SeriesDescription (`*t1*`)."""
    echo_ms: float = 0.0
    """Echo time, of a series with several; 0 takes all."""
    image_type: str = ""
    """Pattern of ImageType, its words separated by slashes (`*/m/*` for magnitude)."""
    time_point: str = ""
    """Pattern of what tells time points apart, as the exclusions name it (`time point 1*`)."""


@dataclass
class DataConfig:
    """A site's scans and the table that describes them."""

    RENAMED: ClassVar[dict[str, str]] = {
        "released": "burned_in_text_checked",
        "series_description": "series.description",
    }

    root: str = MISSING
    """Folder of the scans."""
    table: str = MISSING
    """CSV or TSV file with one row a visit. Its cells are separated by commas, semicolons, tabs or bars; a number may
    have a decimal comma where no comma separates cells."""
    encoding: str = ""
    """Encoding of the table, for example `windows-1252`; empty for UTF-8, or UTF-16 with a byte order mark. None is
    guessed: a row is excluded if a cell that is needed is not UTF-8."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    joined: list[JoinedConfig] = field(default_factory=list)
    """Further tables with more columns for the same patients or visits."""
    extract: dict[str, str] = field(default_factory=dict)
    """Column -> pattern of its cells. Each name in braces becomes a further column; it stands for anything but a slash,
    and so does `*` (`Path: "CheXpert-v1.0-small/*/{patient}/{study}/*"`)."""
    where: dict[str, Any] = field(default_factory=dict)
    """Column -> the cell, or a list of cells, of the rows that are used (`Frontal/Lateral: Frontal`). Other rows are
    counted among the exclusions."""
    values: dict[str, dict[Any, Any]] = field(default_factory=dict)
    """Attribute -> the site's value -> the modality's value; a value that is not listed is taken as it is. A number
    stands for every way to write it (1 and 1.0), and an unquoted Yes, No, On, Off, True or False for all words that
    YAML reads as the same."""
    rules: dict[str, list[RuleConfig]] = field(default_factory=dict)
    """Attribute -> rules, in place of a column in `columns.attributes`; the first rule that fits gives the value, and
    without one it is missing (`diagnosis: [{where: {Cardiomegaly: 1}, value: HF}]`)."""
    date_format: str = ""
    """Format of the table's dates as in strptime (`%d.%m.%Y`); empty for ISO 8601."""
    date_tolerance_days: int = 0
    """Largest number of days between a scan and its row; the nearest row is taken."""
    file_pattern: str = ""
    """Pattern of a row's path relative to `root`, in place of `columns.file`: a column's name in braces stands for the
    row's cell, `*` for anything (`{OASIS_session_label}/anat*/*_T1w.nii.gz`). Exactly one file must match."""
    series: SeriesConfig = field(default_factory=SeriesConfig)
    accept: list[str] = field(default_factory=list)
    """Kinds of contradictions whose visits are kept: `patient`, `date`, `sex` and `age` of a table and a header,
    `sex-over-visits`, `age-over-visits`, `one-scan`. They are counted in the summary."""
    burned_in_text_checked: list[str] = field(default_factory=list)
    """Patterns of paths relative to `root` that a person has checked for burned-in text (`dicom/P007/*`)."""

    def __post_init__(self) -> None:
        require(self.date_tolerance_days >= 0, "data.date_tolerance_days must not be negative")
        unknown = sorted(set(self.accept) - set(Contradiction))
        require(not unknown, f"data.accept: {', '.join(unknown)}: use {', '.join(Contradiction)}")
        _require_encoding("data.encoding", self.encoding)
        _require_date_format(self.date_format)
        twice = bool(self.columns.file and self.file_pattern)
        require(not twice, "data has columns.file and file_pattern: each names a row's file, use one of them")
        for column, pattern in self.extract.items():
            names = PLACEHOLDER.findall(pattern)
            fits = bool(names) and len(names) == len(set(names))
            require(fits, f"data.extract.{column} is '{pattern}': put one name or more in braces, each once")
        self.where = _accepted("data.where", self.where)
        self.values = {name: _translations(name, values) for name, values in self.values.items()}
        for name in self.rules:
            taken = name in self.columns.attributes or name in self.values
            taken = taken or (name == AGE and bool(self.columns.age_at_baseline))
            require(not taken, f"data.rules.{name} stands beside a column or values of {name}: use one of them")


def _accepted(key: str, where: dict[str, Any]) -> dict[str, Any]:
    """Columns with lists of words, of which the site may have written one, numbers or YAML's booleans."""
    return {
        column: [word for cell in (cells if isinstance(cells, list) else [cells]) for word in _words(key, cell)]
        for column, cells in where.items()
    }


def _translations(name: str, values: dict[Any, Any]) -> dict[Any, Any]:
    """The site's words -> the modality's, of which the site may have written numbers or YAML's booleans."""
    translated: dict[Any, Any] = {}
    for written, value in values.items():
        require(not isinstance(value, bool), f"data.values.{name}: put quotes round {'Yes' if value else 'No'}")
        has_value = isinstance(value, (str, int, float))
        require(has_value, f"data.values.{name}: '{written}' has no value: name one of the modality's")
        words = _words(f"data.values.{name}", written)
        translated |= {word: str(value) for word in words if len(words) == 1 or word not in values}
    return translated


def _words(key: str, written: Any) -> Sequence[str]:
    """The cells that a word, number or boolean of the YAML file stands for."""
    if isinstance(written, bool):
        return YAML_WORDS[written]
    require(isinstance(written, (str, int, float)), f"{key}: '{written}' is no word and no number")
    return [str(written)]


def _require_encoding(key: str, encoding: str) -> None:
    require(
        not encoding or is_encoding(encoding),
        f"{key} is '{encoding}': name an encoding that extends ASCII, such as windows-1252, or leave it empty",
    )


def _require_date_format(date_format: str) -> None:
    try:
        datetime.datetime.strptime("", date_format)
    except re.error:
        problem = "a part occurs twice"
    except ValueError as error:
        problem = str(error) if "directive" in str(error) or "stray" in str(error) else ""
    else:
        problem = ""
    require(not problem, f"data.date_format is '{date_format}': {problem}; write it as for strptime, such as %d.%m.%Y")
