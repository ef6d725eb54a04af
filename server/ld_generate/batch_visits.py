"""Visits of one patient in several rows of a batch table: which come before a row, and whether they agree."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from ld_common.core.errors import LdError, RequestError
from ld_common.editing.history import EarlierScan, years_between
from ld_common.imaging.modality import AGE, Modality
from ld_common.imaging.readers import read_scan
from ld_common.imaging.scan_table import agree, shown
from ld_generate.batch_table import BatchRow
from ld_generate.request import RequestOptions, dated

KEPT_SCANS = 64
"""Scans that stay in memory: a patient's rows mostly stand together."""


class PatientVisits:
    """The visits of a table's patients; scans are read when a row needs them."""

    def __init__(self, rows: Sequence[BatchRow], folder: Path, modality: Modality, options: RequestOptions) -> None:
        """Take the rows.

        Args:
            rows: of the whole table.
            folder: the table's; paths of scans are relative to it.
            modality: the release's.
            options: as for every row.
        """
        self._folder, self._modality, self._options = folder, modality, options
        self._by_patient: dict[str, list[BatchRow]] = defaultdict(list)
        for row in rows:
            self._by_patient[row.patient].append(row)
        self.read = functools.lru_cache(KEPT_SCANS)(self._read)

    def candidates(self, row: BatchRow) -> list[BatchRow]:
        """Other visits of the row's patient, but for those that the table dates after it."""
        if not row.patient:
            return []
        others = [other for other in self._by_patient[row.patient] if not _same_scan(row, other)]
        now = row.study_date
        return [other for other in others if now is None or other.study_date is None or not other.study_date > now]

    def before(self, row: BatchRow) -> list[EarlierScan]:
        """The scans of the row's patient from earlier dates, in any order.

        Raises:
            RequestError: a row of the patient contradicts this one or another, or does not say when it was.
            ScanError: the row's own scan cannot be used.
        """
        if not row.patient:
            return []
        now, earlier = self.read(row), dict[BatchRow, EarlierScan]()
        for other in self._by_patient[row.patient]:
            dates = {row.study_date, other.study_date} - {None}
            if _same_scan(row, other) and len(dates) > 1:
                raise RequestError(f"rows {row.number} and {other.number} give one scan two dates")
        for other in self.candidates(row):
            try:
                visit = self.read(other)
            except LdError as error:
                raise RequestError(
                    f"row {other.number} of the same patient cannot be used as a visit before this one: {error}"
                ) from error
            years = years_between(visit, now)
            if years is None:
                raise RequestError(
                    f"rows {other.number} and {row.number} of one patient do not say which was first: give both dates"
                )
            if years == 0:
                raise RequestError(f"rows {other.number} and {row.number} of one patient {_same_time(visit, now)}")
            if years > 0 and not any(_same_scan(other, known) for known in earlier):
                earlier[other] = visit
        self._check_patient(row, now, earlier)
        return list(earlier.values())

    def _check_patient(self, row: BatchRow, now: EarlierScan, earlier: dict[BatchRow, EarlierScan]) -> None:
        """Refuse two scans of a day, and files of several patients."""
        visits = sorted([*earlier.items(), (row, now)], key=lambda item: -(years_between(item[1], now) or 0.0))
        for (first, before), (second, after) in pairwise(visits):
            if years_between(before, after) == 0:
                raise RequestError(
                    f"rows {first.number} and {second.number} of one patient {_same_time(before, after)}"
                )
        named = [(visited, visit.scan.patient_id) for visited, visit in visits if visit.scan.patient_id]
        for (first, one), (second, other) in pairwise(named):
            if one != other:
                raise RequestError(
                    f"rows {first.number} and {second.number} have one patient in the table, and their files have "
                    "different Patient IDs"
                )

    def _read(self, row: BatchRow) -> EarlierScan:
        """A row's scan with its date and age; raises `ScanError` or `RequestError`."""
        row.check()
        if not row.input:
            raise RequestError("the row lacks its input")
        path, options = self._folder / row.input, self._options
        scan = read_scan(path, self._modality, row.slice_index, options.burned_in_text_checked)
        scan = dated(path, scan, row.study_date)
        source = options.source | self._modality.parse_all(row.source)
        for name in sorted(set(scan.attributes_in_file) & set(source)):
            if not agree(scan.attributes_in_file[name], source[name]):
                in_file, given = shown(scan.attributes_in_file[name]), shown(source[name])
                raise RequestError(f"{name} is {in_file} in '{path}' and {given} in the table or --source")
        age = (scan.attributes_in_file | source).get(AGE)
        return EarlierScan(scan, None if age is None else float(age), f"row {row.number}, '{row.input}'")


def _same_scan(row: BatchRow, other: BatchRow) -> bool:
    """Whether two rows ask about one scan; they are one visit."""
    return (row.input, row.slice_index if row.slice.isdecimal() else row.slice) == (
        other.input,
        other.slice_index if other.slice.isdecimal() else other.slice,
    )


def _same_time(first: EarlierScan, second: EarlierScan) -> str:
    if first.scan.study_date is not None and second.scan.study_date is not None:
        return "have one date: keep one scan of a day"
    return f"have the age {first.age:g} and not both a date: fill in both dates, or keep one"
