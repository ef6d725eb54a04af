"""Reads a site's files and table into visits without identity; a file that cannot be used is an exclusion.

`survey` reads headers and joins them with the table; `read_visits` then reads the pixels, patient by patient.
"""

from __future__ import annotations

import datetime
import fnmatch
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ld_client.data.exclusions import Exclusion, Reason
from ld_client.data.pseudonyms import pseudonym
from ld_client.data.table import Table, TableRow, read_table
from ld_client.site_config import SiteConfig
from ld_common.core.config import is_number
from ld_common.core.errors import RequestError, ScanError, TableError
from ld_common.imaging.decoding_process import read_headers, read_scan
from ld_common.imaging.dicom import DicomHeader, choose_slice
from ld_common.imaging.geometry import Scan, value_range
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.rejection import ScanRejected

FOUND_BY_NAME = (".nii", ".nii.gz", ".png")
"""Endings of files without patient and date, which the table's file column names."""

Progress = Callable[[str, int, int], None]
"""Called with a stage, the items done and all items."""


@dataclass(frozen=True, eq=False)
class Visit:
    """One scan of one patient, without identity."""

    pseudonym: str
    days_since_baseline: int
    """Days since the patient's first usable visit."""
    attributes: Attributes
    scan: Scan


@dataclass(frozen=True, eq=False)
class Candidate:
    """A scan with a row of the table, before its pixels are read. It names files of the site."""

    source: Path
    """The file that holds the slice."""
    name: str
    files: int
    series_number: int
    attributes: Attributes


@dataclass
class Survey:
    """Candidates by pseudonym and date, from the headers and the table, and exclusions."""

    site: SiteConfig
    modality: Modality
    patients: dict[str, dict[datetime.date, list[Candidate]]] = field(default_factory=dict)
    exclusions: list[Exclusion] = field(default_factory=list)

    @property
    def scans(self) -> int:
        """Number of visits to read."""
        return sum(len(dates) for dates in self.patients.values())


def survey(site: SiteConfig, modality: Modality, key: bytes, progress: Progress) -> Survey:
    """Read the table and every file's header and join them; `key` makes the pseudonyms.

    Raises:
        TableError: the root is not a folder, or the table does not fit the config.
    """
    table, root = read_table(site.data), Path(site.data.root)
    if not root.is_dir():
        raise TableError(f"data.root '{root}' is not a folder: set it to the folder that holds the scans")
    joiner = _Joiner(Survey(site, modality, exclusions=list(table.exclusions)), table, key)
    files = _files(site)
    with_header = [path for path in files if not path.name.lower().endswith(FOUND_BY_NAME)]
    headers = read_headers([(path, _is_checked(path, site)) for path in with_header], modality.dicom_modalities)
    for done, path in enumerate(files, start=1):
        joiner.add_file(path, None if path.name.lower().endswith(FOUND_BY_NAME) else next(headers))
        progress("reading headers", done, len(files))
    joiner.join_series()
    return joiner.survey


def read_visits(surveyed: Survey) -> Iterator[Visit | Exclusion]:
    """Every visit in the order (pseudonym, day), and the exclusions on the way.

    Of several series of one patient and date, the first readable one is taken, in the order of their numbers.
    """
    for patient in sorted(surveyed.patients):
        read: list[tuple[datetime.date, Candidate, Scan]] = []
        for date in sorted(surveyed.patients[patient]):
            taken = None
            for candidate in sorted(
                surveyed.patients[patient][date], key=lambda series: (series.series_number, series.name)
            ):
                if taken is not None:
                    detail = f"the visit's scan is {taken.name}"
                    yield Exclusion(candidate.name, candidate.files, Reason.OTHER_SERIES, detail)
                    continue
                scan = _read(candidate, surveyed)
                if isinstance(scan, Exclusion):
                    yield scan
                else:
                    taken = candidate
                    read.append((date, candidate, scan))
        for date, candidate, scan in read:
            yield Visit(patient, (date - read[0][0]).days, candidate.attributes, scan)


def _read(candidate: Candidate, surveyed: Survey) -> Scan | Exclusion:
    try:
        scan = read_scan(candidate.source, surveyed.modality, released=_is_checked(candidate.source, surveyed.site))
        value_range(scan, surveyed.modality.image)
    except ScanRejected as error:
        return Exclusion(candidate.name, candidate.files, Reason(error.rejection.value), error.detail)
    except ScanError as error:
        return Exclusion(candidate.name, candidate.files, Reason.NO_CONTRAST, str(error))
    return scan


def _files(site: SiteConfig) -> list[Path]:
    """Every file under the root except the table, the store and hidden files, in a fixed order."""
    skipped = {Path(site.data.table).resolve(), Path(site.store).resolve()}
    files: list[Path] = []
    for folder, folders, names in os.walk(site.data.root):
        folders[:] = [
            name for name in folders if not name.startswith(".") and (Path(folder) / name).resolve() not in skipped
        ]
        paths = [Path(folder) / name for name in names if not name.startswith(".")]
        files += [path for path in paths if path.resolve() not in skipped]
    return sorted(files)


def _name(path: Path, site: SiteConfig) -> str:
    return path.relative_to(site.data.root).as_posix()


def _is_checked(path: Path, site: SiteConfig) -> bool:
    return any(fnmatch.fnmatchcase(_name(path, site), pattern) for pattern in site.data.burned_in_text_checked)


@dataclass
class _Joiner:
    """Joins files with rows: a match becomes a candidate, all others become exclusions."""

    survey: Survey
    table: Table
    key: bytes
    series: dict[str, dict[str, DicomHeader]] = field(default_factory=dict)
    """Series -> SOP Instance UID (or name) -> header."""
    used: set[int] = field(default_factory=set)
    """Lines of the rows that have a file."""

    def add_file(self, path: Path, header: DicomHeader | ScanRejected | None) -> None:
        """Add one file: as a candidate with its row, a slice of a series, or an exclusion.

        Its header is None for a file that is `FOUND_BY_NAME`.
        """
        name = _name(path, self.survey.site)
        row = self.table.by_file.get(name)
        if row is not None:
            self.used.add(row.line)
        if header is None:
            if row is not None:
                self._add(row.patient, row.date, row, None, Candidate(path, name, 1, 0, {}))
            else:
                column = self.survey.site.data.columns.file
                detail = "no row names this file" if column else "set data.columns.file to match its row"
                self._exclude(name, 1, Reason.NO_TABLE_ROW, detail)
            return
        if isinstance(header, ScanRejected):
            self._exclude(name, 1, Reason(header.rejection.value), header.detail)
            return
        if row is not None:
            self._add(row.patient, row.date, row, header, Candidate(path, name, 1, _number(header), {}))
        else:
            self._add_slice(name, header)

    def join_series(self) -> None:
        """Join every series with its row, then exclude the rows without a file."""
        for group in sorted(self.series):
            headers = list(self.series[group].values())
            name = _name(headers[0].path, self.survey.site)
            try:
                self._join(name, headers)
            except ScanRejected as error:
                self._exclude(name, len(headers), Reason(error.rejection.value), error.detail)
        for row in self.table.rows():
            if row.line not in self.used:
                self._exclude(f"row {row.line}", 0, Reason.NO_SCAN, "no file matches this row")

    def _add_slice(self, name: str, header: DicomHeader) -> None:
        pattern = self.survey.site.data.series_description.lower()
        if pattern and not fnmatch.fnmatchcase(header.series_description.lower(), pattern):
            self._exclude(name, 1, Reason.NOT_SELECTED, "see data.series_description")
            return
        # each two-dimensional image is a scan; the slices of a volume are one
        single = self.survey.modality.image.plane == "none" or not header.series_uid
        group = header.sop_uid or name if single else f"{header.series_uid} {header.patient_id}"
        slices = self.series.setdefault(group, {})
        if header.sop_uid in slices:
            detail = f"the same DICOM object as {_name(slices[header.sop_uid].path, self.survey.site)}"
            self._exclude(name, 1, Reason.DUPLICATE, detail)
        else:
            slices[header.sop_uid or name] = header

    def _join(self, name: str, headers: list[DicomHeader]) -> None:
        patient, date = headers[0].patient_id, headers[0].study_date
        if not patient or date is None:
            detail = "the header has no PatientID or no StudyDate"
            self._exclude(name, len(headers), Reason.NO_PATIENT_OR_DATE, detail)
            return
        row, days = self.table.nearest(patient, date)
        if row is None or days > self.survey.site.data.date_tolerance_days:
            detail = f"the nearest row is {days} days away; see data.date_tolerance_days"
            detail = "the table has no row of this patient" if row is None else detail
            self._exclude(name, len(headers), Reason.NO_TABLE_ROW, detail)
            return
        self.used.add(row.line)
        chosen = choose_slice(headers, self.survey.modality.image.slice_position)
        self._add(patient, date, row, chosen, Candidate(chosen.path, name, len(headers), _number(chosen), {}))

    def _add(
        self, patient: str, date: datetime.date, row: TableRow, header: DicomHeader | None, candidate: Candidate
    ) -> None:
        for name in self.survey.modality.attributes:
            problem = self._add_attribute(name, row, header, candidate.attributes)
            if problem is not None:
                self._exclude(candidate.name, candidate.files, *problem)
                return
        dates = self.survey.patients.setdefault(pseudonym(self.key, patient), {})
        dates.setdefault(date, []).append(candidate)

    def _add_attribute(
        self, name: str, row: TableRow, header: DicomHeader | None, attributes: Attributes
    ) -> tuple[Reason, str] | None:
        """Add an attribute's value from the table, or else from the header; returns the problem if there is none."""
        text = row.cells.get(name, "")
        text = self.survey.site.data.values.get(name, {}).get(text, text)
        if not text and header is not None:
            in_header = {"age": "" if header.age_years is None else str(header.age_years), "sex": header.sex}
            text = in_header.get(name, "")
        if not text:
            return Reason.MISSING_VALUE, f"no {name} in row {row.line} or in the header"
        try:
            attributes[name] = self.survey.modality.parse(name, text)
        except RequestError as error:
            number = not self.survey.modality.attributes[name].categories and is_number(text)
            return (Reason.OUT_OF_RANGE if number else Reason.UNKNOWN_VALUE), f"row {row.line}: {error}"
        return None

    def _exclude(self, name: str, files: int, reason: Reason, detail: str) -> None:
        self.survey.exclusions.append(Exclusion(name, files, reason, detail))


def _number(header: DicomHeader) -> int:
    """Series number; series without one come last."""
    return 2**31 if header.series_number is None else header.series_number
