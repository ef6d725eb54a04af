"""Which DICOM images are read: checks of a header, before its pixels are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydicom import Dataset

from ld_common.imaging.dicom_elements import has, items, text, texts, uid, whole
from ld_common.imaging.dicom_header import image_type_of
from ld_common.imaging.rejection import MAX_PIXELS, Rejection, ScanRejected, check_slice_size

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
PROCESSED = ("MR", "CR", "DX")
"""Modalities whose DERIVED\\PRIMARY images are acquisitions that the device processed, such as most of CR."""
GREY = (["MONOCHROME1"], ["MONOCHROME2"])


def check_header(path: Path, dataset: Dataset, modalities: Sequence[str], released: bool) -> None:
    """Refuse what is no grey image of one of `modalities`, unless `released` also what may hold text.

    Raises:
        ScanRejected: the image cannot be used.
        ValueError, TypeError: an element that is needed holds no number.
    """
    rows, columns, bits = (whole(dataset, name) for name in ("Rows", "Columns", "BitsAllocated"))
    if not (rows and columns and bits):
        raise ScanRejected(path, Rejection.NOT_AN_IMAGE, _without_pixels(dataset))
    if text(dataset, "Modality") not in modalities:
        raise ScanRejected(path, Rejection.WRONG_MODALITY, f"DICOM Modality is not {' or '.join(modalities)}")
    if text(dataset, "SyntheticData") == "YES":
        raise ScanRejected(path, Rejection.SYNTHETIC, "SyntheticData is YES: only real scans are read")
    check_slice_size(path, rows, columns)
    _check_frames(path, dataset, rows, columns)
    words = image_type_of(dataset)
    _check_kind(path, dataset, words)
    _check_pixels(path, dataset, bits)
    if not released:
        _check_burned_in(path, dataset, words)


def _without_pixels(dataset: Dataset) -> str:
    if has(dataset, "DirectoryRecordSequence"):
        return "the index of a disc (DICOMDIR): the images beside it are read without it"
    return "a DICOM object without pixels"


def _check_frames(path: Path, dataset: Dataset, rows: int, columns: int) -> None:
    frames = int(float(text(dataset, "NumberOfFrames") or 1))
    if rows * columns * frames > MAX_PIXELS:
        detail = f"{rows} x {columns} x {frames} pixels, at most {MAX_PIXELS} are read"
        raise ScanRejected(path, Rejection.TOO_LARGE, detail)
    places = len(items(dataset, "PerFrameFunctionalGroupsSequence"))
    if frames > 1 and not places:
        detail = "several frames without a place for each: convert it to classic single-frame DICOM or NIfTI (dcm2niix)"
        raise ScanRejected(path, Rejection.UNSUPPORTED, detail)
    if places not in (0, frames):
        raise ScanRejected(path, Rejection.UNREADABLE, f"{frames} frames, and a place for {places} of them")


def _check_kind(path: Path, dataset: Dataset, image_type: Sequence[str]) -> None:
    if "MOSAIC" in image_type:
        detail = "a mosaic of many slices in one picture: convert it to NIfTI (dcm2niix)"
        raise ScanRejected(path, Rejection.UNSUPPORTED, detail)
    if text(dataset, "PresentationIntentType") == "FOR PROCESSING":
        detail = "FOR PROCESSING: the detector's raw values; take the image FOR PRESENTATION"
        raise ScanRejected(path, Rejection.UNSUPPORTED, detail)
    if "LOCALIZER" in image_type:
        raise ScanRejected(path, Rejection.LOCALIZER, "its ImageType is LOCALIZER: it shows where the scan was taken")


def _check_pixels(path: Path, dataset: Dataset, bits: int) -> None:
    samples = texts(dataset, "SamplesPerPixel") or ["1"]
    if samples != ["1"] or texts(dataset, "PhotometricInterpretation") not in GREY:
        raise ScanRejected(path, Rejection.UNSUPPORTED, "not a grey image")
    stored = whole(dataset, "BitsStored")
    if stored is None:
        raise ValueError
    if bits not in (8, 16) or not 1 <= stored <= bits:
        raise ScanRejected(path, Rejection.UNSUPPORTED, "its pixels do not have 8 or 16 bits")


def _check_burned_in(path: Path, dataset: Dataset, image_type: Sequence[str]) -> None:
    annotated, modality = has(dataset, "BurnedInAnnotation"), text(dataset, "Modality")
    stated = [word.upper() for word in texts(dataset, "BurnedInAnnotation")]
    suspicions = {
        "BurnedInAnnotation is not NO": annotated and stated != ["NO"],
        "a secondary capture": uid(dataset, "SOPClassUID").startswith(SECONDARY_CAPTURE),
        "ImageType is DERIVED": "DERIVED" in image_type and (modality not in PROCESSED or "PRIMARY" not in image_type),
        "an ultrasound image without BurnedInAnnotation": modality == "US" and not annotated,
    }
    present = [suspicion for suspicion, true in suspicions.items() if true]
    if present:
        raise ScanRejected(path, Rejection.BURNED_IN, f"{', '.join(present)}: check it by hand")
