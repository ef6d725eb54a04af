"""Scans before their pixels are read: the images of a series that make one, and what tells it from others."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ld_client.data.contradictions import SHORT_STACK, Doubt
from ld_client.data.exclusions import Exclusion, Reason
from ld_client.data.site_files import relative_name
from ld_client.site_config import SiteConfig
from ld_common.imaging.dicom_header import DicomHeader
from ld_common.imaging.modality import PROJECTION, Attributes, Modality
from ld_common.imaging.rejection import ScanRejected
from ld_common.imaging.scan_reader import AXES, Source, unfit
from ld_common.imaging.series import Series, ordered

LAST_NUMBER = 2**31
"""Of series without a number, which come last."""
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
    is_mixed: bool = False
    """Whether its plane was chosen among several of its file, such as a survey's: any other series goes before it."""

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
    return relative_name(path, site.data.root)


def kind_of(header: DicomHeader) -> str:
    """What tells a series from others of its visit."""
    echo = "" if header.echo_ms is None else f"echo {header.echo_ms:g} ms"
    return ", ".join(filter(None, (f"'{header.series_description}'", echo, header.image_type)))


@dataclass(frozen=True, eq=False)
class FoundScan:
    """The scan of a series, and what is said of the series."""

    candidate: Candidate
    exclusions: Sequence[Exclusion] = ()
    """Of its images in other planes."""
    doubts: Sequence[Doubt] = ()


def scan_of_series(images: Sequence[DicomHeader], site: SiteConfig, modality: Modality) -> FoundScan:
    """The scan of a series, its images in order; raises `ScanRejected` for one that is none."""
    problem = unfit(images[0], modality)
    if problem is not None:
        raise ScanRejected(images[0].path, *problem)
    if modality.image.plane == PROJECTION:
        return FoundScan(_candidate(images, site, kind_of(images[0])))
    series = ordered(images[0].path, images, AXES[modality.image.plane])
    first, count = series.headers[0], len(series.headers)
    # an aborted run, and a slice that is a scan of its own, are no repeats
    kind = f"{kind_of(first)}, {count} slices"
    kind += f" at {first.position_mm:.1f} mm" if count == 1 and first.position_mm is not None else ""
    kind += {0: ", sagittal", 1: ", coronal"}.get(series.plane_axis if series.plane_axis is not None else 2, "")
    candidate = _candidate(series.headers, site, kind, series.is_mixed)
    return FoundScan(candidate, list(_other_planes(series, site)), list(_short(series, site, modality.image.part_mm)))


def _candidate(headers: Sequence[DicomHeader], site: SiteConfig, kind: str, is_mixed: bool = False) -> Candidate:
    paths = list(dict.fromkeys(header.path for header in headers))
    number = LAST_NUMBER if headers[0].series_number is None else headers[0].series_number
    source: Source = paths[0] if len(paths) == 1 else tuple(paths)
    return Candidate(source, name_of(min(paths), site), len(paths), number, {}, kind, headers, is_mixed)


def _other_planes(series: Series, site: SiteConfig) -> Iterator[Exclusion]:
    """One exclusion for each file with images of other planes; it counts no file whose other images are used."""
    used = {header.path for header in series.headers}
    for path, count in Counter(header.path for header in series.left_out).items():
        detail = f"its plane is another one than that of the {len(series.headers)} images of its series"
        if path in used:
            detail = f"{count} of its frames have another plane than the {len(series.headers)} that make a scan"
        yield Exclusion(name_of(path, site), 0 if path in used else 1, Reason.WRONG_GEOMETRY, detail)


def _short(series: Series, site: SiteConfig, part_mm: float) -> Iterator[Doubt]:
    covered = series.step_mm * len(series.headers)
    if 0 < covered < SHORT_SHARE * part_mm:
        detail = (
            f"{len(series.headers)} slices cover {covered:.0f} mm of a part of {part_mm:g} mm: is the series whole?"
        )
        yield Doubt(SHORT_STACK, name_of(series.headers[0].path, site), detail)
