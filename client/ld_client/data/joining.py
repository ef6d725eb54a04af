"""Joins a site's files with the rows of its table: a match becomes a candidate, all others become exclusions."""

from __future__ import annotations

import datetime
import fnmatch
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from ld_client.data.candidates import Candidate, kind_of, name_of, scan_of_series
from ld_client.data.contradictions import Contradictions, content_digest, shared_files
from ld_client.data.exclusions import Exclusion, Reason
from ld_client.data.pseudonyms import pseudonym
from ld_client.data.table import ENTRY, Table, TableRow, Time
from ld_client.data.table_paths import FileNames
from ld_client.data.withdrawn_scans import WithdrawnScans
from ld_client.data_config import Contradiction
from ld_client.site_config import SiteConfig
from ld_common.core.config import is_number
from ld_common.core.errors import RequestError
from ld_common.imaging.dicom_header import DicomHeader
from ld_common.imaging.modality import PROJECTION, Attributes, Modality
from ld_common.imaging.rejection import Rejection, ScanRejected
from ld_common.imaging.scan_reader import PICTURES
from ld_common.imaging.series import grouped

OF_A_SERIES = frozenset(
    (
        *(Rejection.BURNED_IN, Rejection.LOCALIZER, Rejection.SYNTHETIC),
        *(Rejection.UNSUPPORTED, Rejection.WRONG_MODALITY),
    )
)
"""Refusals that hold for all images of a series: one line for each folder."""


@dataclass
class Joiner:
    """Takes a site's files one by one; `finish` makes the candidates that only all files can tell."""

    site: SiteConfig
    modality: Modality
    table: Table
    key: bytes
    withdrawn: WithdrawnScans
    contradictions: Contradictions
    digest: Callable[[Path], str] = content_digest
    """Of a file's content."""
    patients: dict[str, dict[datetime.date, list[Candidate]]] = field(default_factory=dict)
    spoilt: dict[tuple[str, datetime.date], set[str]] = field(default_factory=dict)
    exclusions: list[Exclusion] = field(default_factory=list)
    _names: list[str] = field(default_factory=list)
    """Paths of all files."""
    _images: dict[str, list[DicomHeader]] = field(default_factory=lambda: defaultdict(list))
    """Row's file, or nothing for images that are matched by their headers -> their headers."""
    _seen: dict[tuple[str, str, str, float | None], str] = field(default_factory=dict)
    """SOP Instance UID, row's file, patient and position -> the first file with them: some anonymisers give all images
    one UID."""
    _patients_of: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """SOP Instance UID -> patients."""
    _named: dict[Path, str] = field(default_factory=dict)
    """Files without a header -> their patients."""
    _refused: dict[tuple[str, Reason, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    """Folder or file, reason and detail -> files whose header was refused."""
    _used: set[int] = field(default_factory=set)
    """Lines of the rows that have a file."""

    def add_file(self, path: Path, headers: Sequence[DicomHeader] | ScanRejected | None) -> None:
        """Add one file; `headers` are those of its images, or None for one that only the table describes."""
        name = name_of(path, self.site)
        self._names.append(name)
        row = self._row_of(name)
        known = row.patient if row is not None else ""
        if not known and headers is not None and not isinstance(headers, ScanRejected):
            known = headers[0].patient_id
        if row is not None:
            self._used.add(row.line)
        if self.withdrawn.take_file(known, name):
            return
        if isinstance(headers, ScanRejected):
            together = headers.rejection in OF_A_SERIES
            place = PurePosixPath(name).parent.as_posix() if together else name
            self._refused[place, Reason(headers.rejection.value), headers.detail].append(name)
        elif row is None and name in self.table.left_out:
            self._exclude(name, 1, *self.table.left_out[name])
        elif headers is None:
            self._add_named(path, name, row)
        else:
            self._add_images(name, headers, row)

    def finish(self) -> None:
        """Make the candidates of series, then exclude what has no partner and what contradicts itself."""
        for (_, reason, detail), names in self._refused.items():
            self._exclude(names[0], len(names), reason, detail)
        by_header = self._images.pop("", [])
        dates: dict[str, set[datetime.date | str]] = defaultdict(set)
        for header in by_header:
            when = header.study_date or header.study_uid
            if when:
                dates[header.patient_id].add(when)
        for images in self._series(by_header):
            self._join(images, dates)
        for file, headers in self._images.items():
            for images in self._series(headers):
                self._add_series(self.table.by_file[file], images)
        self._doubt_shared()
        self._exclude_over_visits()
        self._exclude_rows()
        if self.withdrawn.files or self.withdrawn.rows:
            detail = f"files and {self.withdrawn.rows} table rows of patients who withdrew consent are not named"
            self._exclude("(names withheld)", self.withdrawn.files, Reason.CONSENT_WITHDRAWN, detail)

    def _row_of(self, name: str) -> TableRow | None:
        """The row that names a file, or a folder above it."""
        place = name
        while self.table.by_file and place:
            if place in self.table.by_file:
                return self.table.by_file[place]
            place = place.rpartition("/")[0]
        return self.table.by_file.get(".")

    def _add_named(self, path: Path, name: str, row: TableRow | None) -> None:
        if row is None:
            data = self.site.data
            named = data.columns.file or data.file_pattern
            detail = "no row names this file" if named else "set data.columns.file to match its row"
            self._exclude(name, 1, Reason.NO_TABLE_ROW, detail)
            return
        self._named[path] = row.patient
        # volumes of one visit are different scans, as far as anybody knows
        kind = "" if self.modality.image.plane == PROJECTION or name.lower().endswith(PICTURES) else f"'{name}'"
        self._add(row, Candidate(path, name, 1, 0, {}, kind))

    def _add_images(self, name: str, headers: Sequence[DicomHeader], row: TableRow | None) -> None:
        chosen = [header for header in headers if self._is_chosen(header)]
        if not chosen:
            self._exclude(name, 1, Reason.NOT_SELECTED, "see data.series")
            return
        place = "" if row is None else row.file
        for header in chosen:
            if header.sop_uid:
                patient = header.patient_id if row is None else row.patient
                self._patients_of[header.sop_uid].add(patient)
                key = header.sop_uid, place, patient, header.position_mm
                if key in self._seen:
                    self._exclude(name, 1, Reason.DUPLICATE, f"the same DICOM object as {self._seen[key]}")
                    return
                self._seen[key] = name
            self._images[place].append(header)

    def _is_chosen(self, header: DicomHeader) -> bool:
        rules = self.site.data.series
        wanted = (
            (rules.description, header.series_description),
            (rules.image_type, header.image_type),
            (rules.time_point, header.time_point),
        )
        matches = all(not pattern or fnmatch.fnmatchcase(value.lower(), pattern.lower()) for pattern, value in wanted)
        echo = "" if header.echo_ms is None else f"{header.echo_ms:g}"  # as the exclusions name it
        return matches and (not rules.echo_ms or echo == f"{rules.echo_ms:g}")

    def _series(self, headers: Sequence[DicomHeader]) -> list[list[DicomHeader]]:
        """Images that make one scan; each two-dimensional image is one."""
        if self.modality.image.plane == PROJECTION:
            return [[header] for header in headers]
        return grouped(headers)

    def _join(self, images: Sequence[DicomHeader], dates: dict[str, set[datetime.date | str]]) -> None:
        """Find the row of a series by its header."""
        name, first = name_of(images[0].path, self.site), images[0]
        patient, date = first.patient_id, first.study_date
        if date is None and self.table.time is Time.NONE:
            date = ENTRY  # no date is asked for
        if not patient or date is None:
            detail = "the header has no PatientID or no date (StudyDate, AcquisitionDate, SeriesDate)"
            self._exclude(name, self._files(images), Reason.NO_PATIENT_OR_DATE, detail)
            return
        row = self.table.match(patient, date, dates[patient], self.site.data.date_tolerance_days)
        if isinstance(row, str):
            self._exclude(name, self._files(images), Reason.NO_TABLE_ROW, row)
            return
        self._used.add(row.line)
        when = date if self.table.time is Time.DATE else row.date
        self._add_series(replace(row, date=when), images)

    def _add_series(self, row: TableRow, images: Sequence[DicomHeader]) -> None:
        """Add a series to the visit of a row."""
        try:
            found = scan_of_series(images, self.site, self.modality)
        except ScanRejected as error:
            name = name_of(images[0].path, self.site)
            self._exclude(name, self._files(images), Reason(error.rejection.value), error.detail)
            if error.rejection in (Rejection.SEVERAL_AT_ONE_PLACE, Rejection.MISSING_SLICE):
                visit = pseudonym(self.key, row.patient), row.date
                self.spoilt.setdefault(visit, set()).add(kind_of(images[0]))
            return
        self.exclusions += found.exclusions
        self.contradictions.doubts += found.doubts
        self._add(row, found.candidate)

    def _add(self, row: TableRow, candidate: Candidate) -> None:
        """Add a scan to the visit of a row, unless a value is missing or contradicts the scan's header."""
        header = candidate.headers[0] if candidate.headers else None
        for name in self.modality.attributes:
            problem = self._add_attribute(name, row, header, candidate.attributes)
            if problem is not None:
                self._exclude(candidate.name, candidate.files, *problem)
                return
        if header is not None:
            dated, tolerance = self.table.time is Time.DATE, self.site.data.date_tolerance_days
            problem = self.contradictions.of_header(row, header, dated, tolerance, candidate.attributes)
            if problem is not None:
                self._exclude(candidate.name, candidate.files, *problem)
                return
        dates = self.patients.setdefault(pseudonym(self.key, row.patient), {})
        dates.setdefault(row.date, []).append(candidate)

    def _add_attribute(
        self, name: str, row: TableRow, header: DicomHeader | None, attributes: Attributes
    ) -> tuple[Reason, str] | None:
        """Add an attribute's value from the table, or else from the header; returns the problem if there is none."""
        text = row.cells.get(name, "")
        text = self.site.data.values.get(name, {}).get(text, text)
        if not text and header is not None:
            in_header = {"age": "" if header.age_years is None else str(header.age_years), "sex": header.sex}
            text = in_header.get(name, "")
        if not text:
            return Reason.MISSING_VALUE, f"no {name} in row {row.line} or in the header"
        try:
            attributes[name] = self.modality.parse(name, text)
        except RequestError as error:
            number = not self.modality.attributes[name].categories and is_number(text)
            return (Reason.OUT_OF_RANGE if number else Reason.UNKNOWN_VALUE), f"row {row.line}: {error}"
        return None

    def _doubt_shared(self) -> None:
        """Note scans that stand under two patients."""
        files = shared_files(self._named, self.digest)
        images = {uid for uid, patients in self._patients_of.items() if len(patients) > 1}
        for candidate in (one for dates in self.patients.values() for found in dates.values() for one in found):
            if candidate.source in files or candidate.uids & images:
                detail = "the same scan stands under another patient"
                self.contradictions.problem(Contradiction.ONE_SCAN, detail, candidate.name)

    def _exclude_over_visits(self) -> None:
        for patient, dates in list(self.patients.items()):
            visits = {date: candidates[0].attributes for date, candidates in dates.items()}
            name = next(iter(dates.values()))[0].name
            problem = self.contradictions.over_visits(visits, name)
            if problem is not None:
                for candidate in (candidate for candidates in dates.values() for candidate in candidates):
                    self._exclude(candidate.name, candidate.files, *problem)
                del self.patients[patient]

    def _exclude_rows(self) -> None:
        files: FileNames | None = None
        for row in self.table.rows():
            if self.withdrawn.take_row(row.patient) or row.line in self._used:
                continue
            nearest = ""
            if row.file:
                files = files or FileNames(self._names)
                nearest = files.nearest(row.file)
            detail = "no file matches this row" + (f"; the nearest is '{nearest}'" if nearest else "")
            self._exclude(f"row {row.line}", 0, Reason.NO_SCAN, detail)

    def _files(self, images: Sequence[DicomHeader]) -> int:
        return len({header.path for header in images})

    def _exclude(self, name: str, files: int, reason: Reason, detail: str) -> None:
        self.exclusions.append(Exclusion(name, files, reason, detail))
