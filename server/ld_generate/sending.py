"""Sends synthetic DICOM files to a PACS over DICOMweb, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom import Dataset, dcmread

from ld_common.core.errors import LdError, RequestError
from ld_common.imaging.dicomweb import PacsService
from ld_common.imaging.dicomweb_errors import PacsSilent
from ld_common.imaging.dicomweb_options import PacsAccess
from ld_common.imaging.rejection import ScanRejected, check_file, rejecting

DICOM = ".dcm"
MOST_SILENT = 3
"""Files in a row that fail because the PACS is silent, before the others are not tried."""


@dataclass(frozen=True)
class SentFile:
    """A file after it was sent."""

    file: str
    sop_instance_uid: str
    problem: str = ""
    """Why the PACS does not have it; empty where it does."""


def synthetic_files(folder: Path) -> list[Path]:
    """The DICOM files in a folder and below it.

    Raises:
        RequestError: there is none, or one is not synthetic.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == DICOM)
    if not files:
        raise RequestError(f"'{folder}' holds no DICOM file ({DICOM}): give a folder of results")
    check_synthetic(files)
    return files


def check_synthetic(files: Sequence[Path]) -> None:
    """Raise `RequestError` for the first file that does not say that it is synthetic."""
    for file in files:
        _read(file, with_pixels=False)


def send_files(
    files: Sequence[Path], access: PacsAccess, progress: Callable[[int], None] = lambda done: None
) -> list[SentFile]:
    """Store synthetic DICOM files; one that the PACS refuses does not stop the others.

    Args:
        files: DICOM files.
        access: the PACS.
        progress: called with the number of files finished since the last call.

    Raises:
        RequestError: a file is not synthetic; nothing was sent then.
    """
    check_synthetic(files)
    results, silent = [], 0
    with PacsService(access) as pacs:
        for file in files:
            dataset, problem = _read(file, with_pixels=True), ""
            if silent < MOST_SILENT:
                try:
                    pacs.store(dataset)
                    silent = 0
                except LdError as error:
                    problem = str(error)
                    silent = silent + 1 if isinstance(error, PacsSilent) else 0
            else:
                problem = f"not tried, as {pacs.host} stopped answering"
            results.append(SentFile(str(file), str(dataset.SOPInstanceUID), problem))
            progress(1)
    return results


def _read(file: Path, with_pixels: bool) -> Dataset:
    """A DICOM file that says of itself that it is synthetic; raises `RequestError` for any other."""
    try:
        check_file(file)
        with rejecting(file):
            dataset = dcmread(file, stop_before_pixels=not with_pixels)
            synthetic = str(dataset.get("SyntheticData") or "").strip().upper() == "YES"
            uid = str(dataset.get("SOPInstanceUID") or "")
    except ScanRejected as error:
        raise RequestError(f"'{file}' is not sent, nor any other file: it is no DICOM file that can be read") from error
    if not synthetic or not uid:
        raise RequestError(
            f"'{file}' is not sent, nor any other file: SyntheticData (0008,001C) is not YES, so it may be a patient's"
        )
    return dataset
