"""Reads a site's files and table into visits without identity; a file that cannot be used is an exclusion.

`survey` reads headers and joins them with the table; `read_visits` then reads the pixels, patient by patient. What a
`FileMemory` knows of a file that did not change is not read again.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ld_client.data.candidates import Candidate, is_checked
from ld_client.data.contradictions import NO_DATES, Contradictions, Doubt, content_digest
from ld_client.data.exclusions import Exclusion, Reason
from ld_client.data.joining import Joiner
from ld_client.data.memory import FileMemory
from ld_client.data.site_files import list_files
from ld_client.data.table_reading import read_table
from ld_client.data.withdrawn_scans import WithdrawnScans
from ld_client.site_config import SiteConfig
from ld_common.core.ahead import map_ahead
from ld_common.core.errors import ScanError, TableError
from ld_common.imaging.decoding_answers import headers_of, refusal_of
from ld_common.imaging.decoding_worker import header_fields
from ld_common.imaging.dicom_header import DicomHeader
from ld_common.imaging.geometry import Scan, value_range
from ld_common.imaging.modality import PROJECTION, Attributes, Modality
from ld_common.imaging.nifti import NIFTI
from ld_common.imaging.readers import read_headers, read_scan
from ld_common.imaging.rejection import ScanRejected
from ld_common.imaging.scan_reader import PICTURES

if TYPE_CHECKING:
    from ld_client.data.encoded_scans import EncodedScan, EncodedScans

FOUND_BY_NAME = (*NIFTI, *PICTURES)
"""Endings of files without patient and date, which the table's file column names."""

HEADERS_AT_ONCE = 4096
"""Files whose remembered headers are looked up before the others are read."""

Progress = Callable[[str, int, int], None]
"""Called with a stage, the items done and all items."""


@dataclass(frozen=True, eq=False)
class Visit:
    """One scan of one patient, without identity."""

    pseudonym: str
    days_since_baseline: int
    """Days since the patient's first usable visit."""
    attributes: Attributes
    scan: Scan | EncodedScan
    """What the last index made of it, if its files have not changed."""
    key: bytes | None = None
    """What the scan's encoding is remembered by; None where its files may still change."""


@dataclass
class Survey:
    """Candidates by pseudonym and date, from the headers and the table, and exclusions."""

    site: SiteConfig
    modality: Modality
    patients: dict[str, dict[datetime.date, list[Candidate]]]
    exclusions: list[Exclusion]
    contradictions: Contradictions
    spoilt: dict[tuple[str, datetime.date], set[str]]
    """Patient and date -> kinds of series that would fit, if they were whole."""

    @property
    def scans(self) -> int:
        """Number of visits to read."""
        return sum(len(dates) for dates in self.patients.values())


def survey(
    site: SiteConfig, modality: Modality, key: bytes, progress: Progress, memory: FileMemory | None = None
) -> Survey:
    """Read the table and every file's header and join them.

    Args:
        site: the site.
        modality: the site's modality.
        key: the store's key, which makes the pseudonyms.
        progress: called with a stage, the items done and all items.
        memory: what is known of the site's files; without it every file is read.

    Raises:
        TableError: the root is not a folder, or the table does not fit the config.
    """
    table, root = read_table(site.data), Path(site.data.root)
    if not root.is_dir():
        raise TableError(f"data.root '{root}' is not a folder: set it to the folder that holds the scans")
    withdrawn = WithdrawnScans.of(site.store_path, key)
    notes = [Doubt(NO_DATES, "table", note) for note in table.notes]
    digests = content_digest if memory is None else memory.content_digest
    contradictions = Contradictions(site.data.accept, doubts=notes)
    joiner = Joiner(site, modality, table, key, withdrawn, contradictions, digests)
    files, lost = list_files(site)
    joiner.exclusions += lost
    with_header = [path for path in files if not path.name.lower().endswith(FOUND_BY_NAME)]
    headers = _headers(with_header, site, modality, memory)
    for done, path in enumerate(files, start=1):
        joiner.add_file(path, None if path.name.lower().endswith(FOUND_BY_NAME) else next(headers))
        progress("reading headers", done, len(files))
    joiner.finish()
    return Survey(
        site,
        modality,
        joiner.patients,
        [*table.exclusions, *joiner.exclusions],
        joiner.contradictions,
        joiner.spoilt,
    )


def _headers(
    paths: Sequence[Path], site: SiteConfig, modality: Modality, memory: FileMemory | None
) -> Iterator[list[DicomHeader] | ScanRejected]:
    """Headers of each file's images, or its refusal; the remembered ones are not read."""
    for start in range(0, len(paths), HEADERS_AT_ONCE):
        some = [(path, is_checked(path, site)) for path in paths[start : start + HEADERS_AT_ONCE]]
        if memory is None:
            yield from read_headers(some, modality.dicom_modalities, site.workers)
            continue
        keys = [memory.key("header", [path], checked, modality.dicom_modalities) for path, checked in some]
        values = [memory.get(key) for key in keys]
        unknown = [file for file, value in zip(some, values, strict=True) if value is None]
        read = read_headers(unknown, modality.dicom_modalities, site.workers)
        for (path, _), key, value in zip(some, keys, values, strict=True):
            if value is not None:
                yield refusal_of(value, path) or headers_of(value, np.empty(0), path)
                continue
            answer = next(read)
            if isinstance(answer, ScanRejected):
                refusal = {"rejection": answer.rejection.value, "detail": answer.detail, "name": ""}
                memory.put(key, refusal)
            else:
                memory.put(key, {"headers": [header_fields(header) for header in answer]})
            yield answer


def read_visits(surveyed: Survey, known: EncodedScans | None = None) -> Iterator[Visit | Exclusion]:
    """Every visit in the order (pseudonym, day), and the exclusions on the way.

    Of several series of one patient and date that are alike, such as a repeat, the first readable one is taken, in the
    order of their numbers; of several that are not, none is, as nobody knows which one is meant.

    Args:
        surveyed: the candidates.
        known: scans that need not be read again.
    """
    places = [(patient, date) for patient in sorted(surveyed.patients) for date in sorted(surveyed.patients[patient])]
    read = map_ahead(lambda place: _read_visit(*place, surveyed, known), places, surveyed.site.workers)
    for patient, found in itertools.groupby(zip(places, read, strict=True), key=lambda item: item[0][0]):
        kept: list[tuple[datetime.date, _Read]] = []
        for (_, date), (taken, exclusions) in found:
            yield from exclusions
            kept += [] if taken is None else [(date, taken)]
        for date, one in kept:
            yield Visit(patient, (date - kept[0][0]).days, one.candidate.attributes, one.scan, one.key)


@dataclass(frozen=True, eq=False)
class _Read:
    """The scan of a visit, and the key of its encoding."""

    candidate: Candidate
    scan: Scan | EncodedScan
    key: bytes | None


def _read_visit(
    patient: str, date: datetime.date, surveyed: Survey, known: EncodedScans | None
) -> tuple[_Read | None, list[Exclusion]]:
    """The scan of a visit, None where it has none that can be used, and the exclusions."""
    found = sorted(surveyed.patients[patient][date], key=lambda series: (series.series_number, series.name))
    candidates = [series for series in found if not series.is_mixed] or found
    detail = "it has several planes, and the visit has a series of one plane"
    exclusions = [Exclusion(one.name, one.files, Reason.OTHER_SERIES, detail) for one in found if one not in candidates]
    spoilt = surveyed.spoilt.get((patient, date), set())
    if _ambiguous(candidates, spoilt, surveyed.modality):
        return None, exclusions + list(_left_out(candidates, spoilt))
    if any(candidate.attributes != candidates[0].attributes for candidate in candidates):
        detail = "several rows of the visit say different things: keep the right one"
        return None, exclusions + [
            Exclusion(one.name, one.files, Reason.CONFLICTING_ROWS, detail) for one in candidates
        ]
    taken = None
    for candidate in candidates:
        if taken is not None:
            detail = f"the visit's scan is {taken.candidate.name}"
            exclusions.append(Exclusion(candidate.name, candidate.files, Reason.OTHER_SERIES, detail))
            continue
        read = _read(candidate, surveyed, known)
        if isinstance(read, Exclusion):
            exclusions.append(read)
        else:
            taken = read
    return taken, exclusions


def _ambiguous(candidates: Sequence[Candidate], spoilt: Collection[str], modality: Modality) -> bool:
    """Whether series of a visit are of different kinds; frontal radiographs of a day all show what was asked for.

    A series that cannot be used, as a slice of it is missing, may be the one that is meant.
    """
    if modality.image.plane == PROJECTION:
        return False
    kinds = {candidate.kind for candidate in candidates}
    return len(kinds) > 1 or any(not kind.startswith(other) for kind in kinds for other in spoilt)


def _left_out(candidates: Sequence[Candidate], spoilt: Collection[str]) -> Iterator[Exclusion]:
    kinds = list(dict.fromkeys([*(candidate.kind for candidate in candidates), *sorted(spoilt)]))
    detail = f"several series of the visit fit: {'; '.join(kinds)}: choose one by data.series"
    yield from (Exclusion(one.name, one.files, Reason.SEVERAL_SERIES, detail) for one in candidates)


def _read(candidate: Candidate, surveyed: Survey, known: EncodedScans | None) -> _Read | Exclusion:
    checked = all(is_checked(path, surveyed.site) for path in candidate.paths)
    key = None if known is None else known.key(candidate.paths, checked, [header.frame for header in candidate.headers])
    if known is not None:
        refused = known.refusal(key)
        if refused is not None:
            return Exclusion(candidate.name, candidate.files, *refused)
        encoded = known.get(key)
        if encoded is not None:
            return _Read(candidate, encoded, key)
    try:
        scan = read_scan(candidate.source, surveyed.modality, released=checked, headers=candidate.headers or None)
        value_range(scan, surveyed.modality.image)
        return _Read(candidate, scan, key)
    except ScanRejected as error:
        reason, detail = Reason(error.rejection.value), error.detail
    except ScanError as error:
        reason, detail = Reason.NO_CONTRAST, str(error)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        # no file ends a run over thousands
        reason, detail = Reason.UNREADABLE, f"it cannot be used ({type(error).__name__}): please report this"
    if known is not None:
        known.refuse(key, reason, detail)
    return Exclusion(candidate.name, candidate.files, reason, detail)
