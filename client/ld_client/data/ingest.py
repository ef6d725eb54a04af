"""Reads a site's files and table into visits without identity; a file that cannot be used is an exclusion.

`survey` reads headers and joins them with the table; `read_visits` then reads the pixels, patient by patient.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ld_client.data.contradictions import NO_DATES, Contradictions, Doubt
from ld_client.data.exclusions import Exclusion, Reason
from ld_client.data.joining import Candidate, Joiner, is_checked
from ld_client.data.table_reading import read_table
from ld_client.data.withdrawn_scans import WithdrawnScans
from ld_client.site_config import SiteConfig
from ld_common.core.errors import ScanError, TableError
from ld_common.imaging.decoding_process import read_headers, read_scan
from ld_common.imaging.geometry import Scan, value_range
from ld_common.imaging.modality import PROJECTION, Attributes, Modality
from ld_common.imaging.nifti import NIFTI
from ld_common.imaging.rejection import ScanRejected
from ld_common.imaging.scan_reader import PICTURES

FOUND_BY_NAME = (*NIFTI, *PICTURES)
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


def survey(site: SiteConfig, modality: Modality, key: bytes, progress: Progress) -> Survey:
    """Read the table and every file's header and join them; `key` makes the pseudonyms.

    Raises:
        TableError: the root is not a folder, or the table does not fit the config.
    """
    table, root = read_table(site.data), Path(site.data.root)
    if not root.is_dir():
        raise TableError(f"data.root '{root}' is not a folder: set it to the folder that holds the scans")
    withdrawn = WithdrawnScans.of(site.store_path, key)
    notes = [Doubt(NO_DATES, "table", note) for note in table.notes]
    joiner = Joiner(site, modality, table, key, withdrawn, Contradictions(site.data.accept, doubts=notes))
    files, lost = _files(site)
    joiner.exclusions += lost
    with_header = [path for path in files if not path.name.lower().endswith(FOUND_BY_NAME)]
    headers = read_headers([(path, is_checked(path, site)) for path in with_header], modality.dicom_modalities)
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


def read_visits(surveyed: Survey) -> Iterator[Visit | Exclusion]:
    """Every visit in the order (pseudonym, day), and the exclusions on the way.

    Of several series of one patient and date that are alike, such as a repeat, the first readable one is taken, in the
    order of their numbers; of several that are not, none is, as nobody knows which one is meant.
    """
    for patient in sorted(surveyed.patients):
        read: list[tuple[datetime.date, Candidate, Scan]] = []
        for date in sorted(surveyed.patients[patient]):
            candidates = sorted(
                surveyed.patients[patient][date], key=lambda series: (series.series_number, series.name)
            )
            spoilt = surveyed.spoilt.get((patient, date), set())
            if _ambiguous(candidates, spoilt, surveyed.modality):
                yield from _left_out(candidates, spoilt)
                continue
            if any(candidate.attributes != candidates[0].attributes for candidate in candidates):
                detail = "several rows of the visit say different things: keep the right one"
                yield from (Exclusion(one.name, one.files, Reason.CONFLICTING_ROWS, detail) for one in candidates)
                continue
            taken = None
            for candidate in candidates:
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


def _read(candidate: Candidate, surveyed: Survey) -> Scan | Exclusion:
    try:
        checked = all(is_checked(path, surveyed.site) for path in candidate.paths)
        scan = read_scan(candidate.source, surveyed.modality, released=checked)
        value_range(scan, surveyed.modality.image)
    except ScanRejected as error:
        return Exclusion(candidate.name, candidate.files, Reason(error.rejection.value), error.detail)
    except ScanError as error:
        return Exclusion(candidate.name, candidate.files, Reason.NO_CONTRAST, str(error))
    return scan


def _files(site: SiteConfig) -> tuple[list[Path], list[Exclusion]]:
    """Every file under the root except the tables, the store and hidden files, in a fixed order; and lost folders."""
    lost: list[Exclusion] = []

    def note(folder: str | Path, detail: str) -> None:
        lost.append(Exclusion(Path(folder).relative_to(site.data.root).as_posix(), 0, Reason.UNREADABLE, detail))

    tables = [site.data.table, *(other.table for other in site.data.joined)]
    skipped = {os.path.realpath(path) for path in (*tables, site.store)}
    files: list[Path] = []
    closed = "no permission to list this folder: change its permissions"
    for place, folders, names in os.walk(site.data.root, onerror=lambda error: note(error.filename, closed)):
        folder = Path(place)
        folders[:] = [
            name for name in folders if not name.startswith(".") and os.path.realpath(folder / name) not in skipped
        ]
        for name in folders:
            if (folder / name).is_symlink():
                note(folder / name, "a link to a folder, which is not followed: set data.root to its target")
        paths = [folder / name for name in names if not name.startswith(".")]
        files += [path for path in paths if os.path.realpath(path) not in skipped]
    return sorted(files), lost
