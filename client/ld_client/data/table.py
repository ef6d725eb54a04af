"""A site's table of visits: rows by patient and time or by file, and excluded rows."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum

from ld_client.data.exclusions import Exclusion, Reason

ENTRY = datetime.date(2000, 1, 1)
"""Stands for day 0 of a table of days, and for the only visit of a patient in a table without dates."""
DAYS_IN_YEAR = 365.25


class Time(StrEnum):
    """How the rows of a table tell when a visit was."""

    DATE = "date"
    DAY = "day"
    """Days since the patient's entry."""
    NONE = "none"
    """Not at all: each patient has one visit."""


@dataclass(frozen=True)
class TableRow:
    """One usable row; it names the patient and is never written to disk."""

    line: int
    """Line number; the header is line 1."""
    patient: str
    date: datetime.date
    """Of a table of days, `ENTRY` plus the days; of one without dates, `ENTRY`."""
    file: str
    """Path relative to the data's root, POSIX form; empty where the table names no file."""
    cells: dict[str, str]
    """Attribute -> cell, as the site wrote it but for decimal commas; "" for a blank one."""


@dataclass
class Table:
    """The rows of a table by file, or by patient and date."""

    by_file: dict[str, TableRow] = field(default_factory=dict)
    by_patient: dict[str, dict[datetime.date, TableRow]] = field(default_factory=dict)
    """Rows without a file: patient -> date -> row."""
    exclusions: list[Exclusion] = field(default_factory=list)
    time: Time = Time.DATE
    left_out: dict[str, tuple[Reason, str]] = field(default_factory=dict)
    """Path of a file -> why the table gives it no row, though it names or matches it."""
    rows_by_patient: Counter[str] = field(default_factory=Counter)
    """Number of a patient's rows, usable or not, without those that `data.where` left out."""

    notes: list[str] = field(default_factory=list)
    """What a person should know of how the table was read."""

    def rows(self) -> list[TableRow]:
        """All usable rows in the table's order."""
        dated = (row for visits in self.by_patient.values() for row in visits.values())
        return sorted([*self.by_file.values(), *dated], key=lambda row: row.line)

    def nearest(self, patient: str, date: datetime.date) -> tuple[TableRow | None, int]:
        """The patient's row nearest in time (of two, the earlier) and its distance in days; (None, 0) without one."""
        visits = self.by_patient.get(patient, {})
        if not visits:
            return None, 0
        nearest_date = min(visits, key=lambda day: (abs((day - date).days), day))
        return visits[nearest_date], abs((nearest_date - date).days)

    def match(
        self, patient: str, study_date: datetime.date, study_dates: Collection[datetime.date | str], tolerance_days: int
    ) -> TableRow | str:
        """The row of a DICOM series without a file in the table, or why it has none.

        A table without dates has none to compare with StudyDate. Then a row is matched only where the patient has one
        row and scans of one date.

        Args:
            patient: PatientID.
            study_date: of the series.
            study_dates: of all the patient's series, or of one without a date its Study Instance UID.
            tolerance_days: largest distance of row and series.
        """
        row, days = self.nearest(patient, study_date)
        if row is None:
            unusable = "none of the patient's rows can be used: see the exclusions of the table's rows"
            return unusable if self.rows_by_patient[patient] else "the table has no row of this patient"
        if self.time is Time.DATE:
            far = f"the nearest row is {days} days away; see data.date_tolerance_days"
            return row if days <= tolerance_days else far
        rows, dates = self.rows_by_patient[patient], len(set(study_dates))
        if rows == dates == 1:
            return row
        has = "days since entry, which no StudyDate tells" if self.time is Time.DAY else "no dates"
        return (
            f"the table has {has}, and the patient has {rows} rows and scans of {dates} dates: name each row's file "
            "(data.columns.file or data.file_pattern), or give the table dates (data.columns.date)"
        )
