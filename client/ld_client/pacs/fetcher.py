"""Fetches series into a quarantine folder, which holds whole series only, and continues what was stopped.

Quarantine:

    .fetch/                 not read by ld-client index, which skips hidden names
      lock
      <name>.json           a series: its UIDs, its objects, whether it is complete
      <name>/               objects of a series that is not complete
    <name>/<object>.dcm     a complete series

Names are hashes of UIDs, so that no path holds what a PACS said.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydicom import dcmread

from ld_client.pacs.query import RemoteSeries
from ld_common.core.atomic_files import held, write_bytes
from ld_common.core.errors import LdError, StoreError
from ld_common.core.strict_json import read_json, read_limited
from ld_common.imaging.dicom import check_inflated
from ld_common.imaging.dicomweb import UID, PacsService
from ld_common.imaging.dicomweb_errors import PacsError, PacsSilent
from ld_common.imaging.rejection import MAX_FILE_BYTES, ScanRejected, rejecting

HIDDEN = ".fetch"
INCOMING = "incoming.part"
OBJECT = re.compile("[0-9a-f]{32}[.]dcm")
IDENTIFIERS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
MOST_SILENT = 3
"""Series in a row that fail because the PACS is silent, before the others are not tried."""

Progress = Callable[[str, int, int], None]
"""Called with a stage, the items done and all items."""


class FetchOutcome(StrEnum):
    """What became of a series."""

    FETCHED = "fetched"
    PRESENT = "already here"
    FAILED = "failed"
    NOT_TRIED = "not tried"


@dataclass(frozen=True)
class FetchedSeries:
    """A series after a fetch."""

    series: RemoteSeries
    outcome: FetchOutcome
    images: int
    """Objects of it that are here."""
    folder: Path
    """Of the series once it is complete."""
    problem: str = ""

    @property
    def missing(self) -> bool:
        """Whether it is not complete."""
        return self.outcome in (FetchOutcome.FAILED, FetchOutcome.NOT_TRIED)


def fetch_series(
    pacs: PacsService, wanted: Sequence[RemoteSeries], quarantine: Path, progress: Progress = lambda *_: None
) -> list[FetchedSeries]:
    """Fetch series that are not in the quarantine yet; one that fails does not stop the others.

    Args:
        pacs: where they are.
        wanted: the series.
        quarantine: folder that is made; other files in it stay.
        progress: called with the objects that are done and all.

    Raises:
        StoreError: the folder cannot be written, is full, or another fetch writes there.
    """
    with _writing(quarantine):
        (quarantine / HIDDEN).mkdir(parents=True, exist_ok=True, mode=0o700)
        refusal = StoreError(f"another fetch writes to '{quarantine}': wait for it, or choose another --out")
        with held(quarantine / HIDDEN / "lock", refusal):
            return list(_fetch_all(pacs, wanted, quarantine, progress))


def _fetch_all(
    pacs: PacsService, wanted: Sequence[RemoteSeries], quarantine: Path, progress: Progress
) -> Iterator[FetchedSeries]:
    total, done, silent = sum(series.images or 0 for series in wanted), 0, 0

    def advance(received: int) -> None:
        progress("fetching images", min(done + received, total), total)

    for series in wanted:
        copy = _LocalSeries(pacs, series, quarantine, advance)
        problem, outcome = "", FetchOutcome.NOT_TRIED
        if silent < MOST_SILENT:
            try:
                outcome, silent = copy.complete(), 0
            except LdError as error:
                if isinstance(error, StoreError):
                    raise
                outcome, problem = FetchOutcome.FAILED, f"{error}"
                silent = silent + 1 if isinstance(error, PacsSilent) else 0
        else:
            problem = f"{pacs.host} stopped answering"
        done += series.images or 0
        advance(0)
        yield FetchedSeries(series, outcome, copy.count(), copy.folder, problem)


@dataclass
class _LocalSeries:
    """The copy of one series."""

    pacs: PacsService
    series: RemoteSeries
    quarantine: Path
    advance: Callable[[int], None]

    @property
    def name(self) -> str:
        """Of the folder."""
        return _hashed(f"{self.series.study_uid}/{self.series.series_uid}")

    @property
    def folder(self) -> Path:
        """Of the series once it is complete."""
        return self.quarantine / self.name

    @property
    def staging(self) -> Path:
        """Of the series until it is complete."""
        return self.quarantine / HIDDEN / self.name

    @property
    def manifest(self) -> Path:
        """What is known of the series."""
        return self.quarantine / HIDDEN / f"{self.name}.json"

    def count(self) -> int:
        """Objects that are here."""
        return len(_objects(self.folder) or _objects(self.staging))

    def complete(self) -> FetchOutcome:
        """Fetch what is missing and put the series in its place.

        Raises:
            PacsError: the PACS does not give what it says it has; what came stays for the next run.
            StoreError: the quarantine cannot be written.
        """
        if self._is_complete():
            return FetchOutcome.PRESENT
        if self.folder.exists():  # it has grown, was altered, or the last run stopped just before its end
            shutil.rmtree(self.staging, ignore_errors=True)
            self.folder.rename(self.staging)
        self.staging.mkdir(exist_ok=True, mode=0o700)
        self._write_manifest({}, complete=False)
        if _objects(self.staging) or self.series.images is None:
            self._fetch_missing()
        else:
            self._fetch_whole(self.series.images)
        found, images = _objects(self.staging), self.series.images
        if images is not None and len(found) != images:
            raise PacsError(f"{len(found)} of {images} images came")
        if not found:
            raise PacsError("the PACS has no image of it")
        (self.staging / INCOMING).unlink(missing_ok=True)
        self.staging.rename(self.folder)
        self._write_manifest(found, complete=True)
        return FetchOutcome.FETCHED

    def _is_complete(self) -> bool:
        try:
            manifest = read_json(read_limited(self.manifest))
            files = dict(manifest["files"]) if manifest["complete"] is True else {}
        except (OSError, ValueError, LookupError, TypeError):
            return False
        images = self.series.images
        return bool(files) and images in (None, len(files)) and _objects(self.folder) == files

    def _write_manifest(self, files: Mapping[str, int], complete: bool) -> None:
        content = {**vars(self.series), "complete": complete, "files": dict(files)}
        write_bytes(self.manifest, json.dumps(content, indent=1, sort_keys=True).encode(), 0o600)

    def _fetch_whole(self, images: int) -> None:
        received: set[str] = set()
        for count, uid in enumerate(self._received(), start=1):
            if count > images:
                if uid not in received:
                    (self.staging / _file_name(uid)).unlink()
                raise PacsError(f"the PACS sends more than the {images} images that it announced")
            received.add(uid)
            self.advance(count)

    def _fetch_missing(self) -> None:
        """Fetch by itself each object that is not here; remove those that the PACS does not list."""
        listed = {uid for uid in self.pacs.instance_uids(self.series.study_uid, self.series.series_uid) if uid}
        names = {_file_name(uid) for uid in listed}
        for name in _objects(self.staging).keys() - names:
            (self.staging / name).unlink()
        if self.series.images is not None and len(listed) != self.series.images:
            raise PacsError(f"the PACS announced {self.series.images} images and lists {len(listed)}")
        for done, uid in enumerate(sorted(listed), start=1):
            if not (self.staging / _file_name(uid)).exists():
                if not UID.fullmatch(uid):
                    raise PacsError("the PACS lists an image whose UID is none")
                received = self._received(uid)
                if next(received, "") != uid or next(received, ""):
                    raise PacsError("the PACS does not send the image that it lists, and that one alone")
            self.advance(done)

    def _received(self, sop_uid: str = "") -> Iterator[str]:
        """The UIDs of the objects that the PACS sends, each checked and in the staging folder."""
        incoming = self.staging / INCOMING
        for _ in self.pacs.retrieve(self.series.study_uid, self.series.series_uid, sop_uid, incoming):
            uid = self._checked(incoming, sop_uid)
            with incoming.open("rb") as stream:
                os.fsync(stream.fileno())
            incoming.replace(self.staging / _file_name(uid))
            if shutil.disk_usage(self.staging).free < 2 * MAX_FILE_BYTES:
                raise StoreError(f"'{self.quarantine}' is almost full: free some space, then fetch again to continue")
            yield uid

    def _checked(self, file: Path, sop_uid: str) -> str:
        """The SOP Instance UID of a file of this series; raises `PacsError` where it is of another, or no DICOM."""
        study, series, uid = _identifiers(file)
        if (study, series) != (self.series.study_uid, self.series.series_uid) or sop_uid not in ("", uid):
            raise PacsError("the PACS sends an image of another series than was asked for, or another image")
        if not UID.fullmatch(uid):
            raise PacsError("the PACS sends an image whose UID is none")
        return uid


def _identifiers(file: Path) -> list[str]:
    """The UIDs of study, series and object in a DICOM file; raises `PacsError` where it is none."""
    try:
        with rejecting(file):
            check_inflated(file)
            dataset = dcmread(file, stop_before_pixels=True, specific_tags=list(IDENTIFIERS))
            return [str(dataset.get(name) or "") for name in IDENTIFIERS]
    except ScanRejected as error:
        raise PacsError("the PACS sends something that is not DICOM, or damaged") from error


def _objects(folder: Path) -> dict[str, int]:
    """Name -> bytes of the objects in a folder; empty where it is absent."""
    if not folder.is_dir():
        return {}
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder) if OBJECT.fullmatch(entry.name)}


def _file_name(sop_uid: str) -> str:
    return f"{_hashed(sop_uid)}.dcm"


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@contextmanager
def _writing(quarantine: Path) -> Iterator[Any]:
    try:
        yield
    except OSError as error:
        problem = error.strerror or error
        raise StoreError(
            f"cannot write to '{quarantine}' ({problem}): check permissions and free space, then fetch again"
        ) from error
