"""Series of a patient in the store's quarantine, where `ld-client fetch` puts what it fetches."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ld_client.data.pseudonyms import pseudonym


@dataclass
class QuarantinedSeries:
    """Folders of series, complete or not."""

    withdrawn: list[Path] = field(default_factory=list)
    """Of the patients asked about."""
    unreadable: list[Path] = field(default_factory=list)
    """Of whom, no file of them says."""


def find_series(store: Path, key: bytes, pseudonyms: frozenset[str]) -> QuarantinedSeries:
    """The series of these patients, by the PatientID of the first file that has one; a series is of one patient."""
    found = QuarantinedSeries()
    for folder in _series_folders(store):
        patient = next((patient for file in sorted(folder.iterdir()) if (patient := _patient_of(file))), "")
        if not patient:
            found.unreadable.append(folder)
        elif pseudonym(key, patient) in pseudonyms:
            found.withdrawn.append(folder)
    return found


def remove_series(folder: Path, store: Path) -> None:
    """Remove a series and what the fetch noted of it; raises `OSError`."""
    from ld_client.pacs.fetcher import HIDDEN

    (_quarantine(store) / HIDDEN / f"{folder.name}.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def _quarantine(store: Path) -> Path:
    from ld_client.pacs.command import QUARANTINE

    return store / QUARANTINE


def _series_folders(store: Path) -> Iterator[Path]:
    from ld_client.pacs.fetcher import HIDDEN

    quarantine = _quarantine(store)
    for parent in (quarantine, quarantine / HIDDEN):
        if parent.is_dir():
            yield from sorted(path for path in parent.iterdir() if path.is_dir() and path.name != HIDDEN)


def _patient_of(file: Path) -> str:
    """The PatientID of a file, as an index reads it; empty where it has none, or is none that can be read."""
    from pydicom import dcmread

    from ld_common.imaging.rejection import ScanRejected, rejecting

    if not file.is_file():
        return ""
    try:
        with rejecting(file):
            return str(
                dcmread(file, stop_before_pixels=True, specific_tags=["PatientID"]).get("PatientID") or ""
            ).strip()
    except ScanRejected:
        return ""
