"""Joins a site's files with the rows of its table: a match becomes a candidate, all others become exclusions."""

from __future__ import annotations

import datetime
import fnmatch
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from ld_client.data.contradictions import SHORT_STACK, Contradictions, Doubt, content_digest, shared_files
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
from ld_common.imaging.scan_reader import PICTURES, Source, unfit
from ld_common.imaging.series import grouped, ordered

LAST_NUMBER = 2**31
"""Of series without a number, which come last."""
OF_A_SERIES = frozenset(
    (
        *(Rejection.BURNED_IN, Rejection.LOCALIZER, Rejection.SYNTHETIC),
        *(Rejection.UNSUPPORTED, Rejection.WRONG_MODALITY),
    )
)
"""Refusals that hold for all images of a series: one line for each folder."""
SHORT_SHARE = 0.25
"""Of a body part's length; a stack that covers less may be half transferred."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A scan with a row of the table, before its pixels are read. It names files of the site."""

    source: Source
    """The file, or the files of a series."""
    name: str
    files: int
    series_number: int
    attributes: Attributes
    kind: str = ""
    """What tells different series of a visit apart; empty for a file without a header."""
    headers: Sequence[DicomHeader] = ()
    """Of its images in order; none for a file without a header."""

    @property
    def uids(self) -> frozenset[str]:
        """SOP Instance UIDs of its images."""
        return frozenset(header.sop_uid for header in self.headers)

    @property
    def paths(self) -> Sequence[Path]:
        """Its files, the one that names it first."""
        return [self.source] if isinstance(self.source, Path) else self.source


def is_checked(path: Path, site: SiteConfig) -> bool:
    """Whether a person has checked a file for burned-in text."""
    return any(fnmatch.fnmatchcase(name_of(path, site), pattern) for pattern in site.data.burned_in_text_checked)


def name_of(path: Path, site: SiteConfig) -> str:
    """A file's path relative to the data's root."""
    return path.relative_to(site.data.root).as_posix()


def _kind(header: DicomHeader) -> str:
    """What tells a series from others of its visit."""
    echo = "" if header.echo_ms is None else f"echo {header.echo_ms:g} ms"
    return ", ".join(filter(None, (f"'{header.series_description}'", echo, header.image_type)))


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
        places = (name, *(parent.as_posix() for parent in PurePosixPath(name).parents))
        return next((self.table.by_file[place] for place in places if place in self.table.by_file), None)

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
            self._add(row, self._candidate(images))
        except ScanRejected as error:
            name = name_of(images[0].path, self.site)
            self._exclude(name, self._files(images), Reason(error.rejection.value), error.detail)
            if error.rejection in (Rejection.SEVERAL_AT_ONE_PLACE, Rejection.MISSING_SLICE):
                visit = pseudonym(self.key, row.patient), row.date
                self.spoilt.setdefault(visit, set()).add(_kind(images[0]))

    def _candidate(self, images: Sequence[DicomHeader]) -> Candidate:
        """The scan of a series, its images in order; raises `ScanRejected` for one that is none."""
        problem = unfit(images[0], self.modality)
        if problem is not None:
            raise ScanRejected(images[0].path, *problem)
        headers = list(images)
        if self.modality.image.plane != PROJECTION:
            series = ordered(images[0].path, images)
            for header in series.left_out:
                detail = f"its plane is another one than that of the {len(series.headers)} images of its series"
                self._exclude(name_of(header.path, self.site), 1, Reason.WRONG_GEOMETRY, detail)
            headers, part = series.headers, self.modality.image.part_mm
            covered = series.step_mm * len(headers)
            if 0 < covered < SHORT_SHARE * part:
                detail = f"{len(headers)} slices cover {covered:.0f} mm of a part of {part:g} mm: is the series whole?"
                name = name_of(headers[0].path, self.site)
                self.contradictions.doubts.append(Doubt(SHORT_STACK, name, detail))
        paths = list(dict.fromkeys(header.path for header in headers))
        first = headers[0]
        kind = _kind(first)
        if self.modality.image.plane != PROJECTION:
            # an aborted run, and a slice that is a scan of its own, are no repeats
            single = len(headers) == 1 and first.position_mm is not None
            kind += f", {len(headers)} slices" + (f" at {first.position_mm:.1f} mm" if single else "")
            kind += {0: ", sagittal", 1: ", coronal"}.get(series.plane_axis if series.plane_axis is not None else 2, "")
        number = LAST_NUMBER if first.series_number is None else first.series_number
        source: Source = paths[0] if len(paths) == 1 else tuple(paths)
        return Candidate(source, name_of(min(paths), self.site), len(paths), number, {}, kind, headers)

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
        files = FileNames(self._names)
        for row in self.table.rows():
            if self.withdrawn.take_row(row.patient) or row.line in self._used:
                continue
            nearest = files.nearest(row.file) if row.file else ""
            detail = "no file matches this row" + (f"; the nearest is '{nearest}'" if nearest else "")
            self._exclude(f"row {row.line}", 0, Reason.NO_SCAN, detail)

    def _files(self, images: Sequence[DicomHeader]) -> int:
        return len({header.path for header in images})

    def _exclude(self, name: str, files: int, reason: Reason, detail: str) -> None:
        self.exclusions.append(Exclusion(name, files, reason, detail))
