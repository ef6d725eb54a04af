"""Reads grey DICOM images, which may be damaged or hostile: every fault raises `ScanRejected`.

A classic file is one image; an enhanced one (Enhanced MR) has several frames, each with a place of its own.
`DicomHeader` is an allow-list: no other header element is read.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from ld_common.imaging.dicom_elements import items, text
from ld_common.imaging.dicom_header import DicomHeader, headers_of, image_type_of, of_frame
from ld_common.imaging.dicom_pixels import check_decoder, check_encoded_size, real_values, stored_pixels
from ld_common.imaging.foreign_files import foreign_kind
from ld_common.imaging.rejection import (
    MAX_FILE_BYTES,
    MAX_PIXELS,
    Rejection,
    ScanRejected,
    check_file,
    check_slice_size,
    rejecting,
)

MAX_NESTING = 16
INFLATED_AT_ONCE = 2**20
HEAD_BYTES = 2**12
"""The start of a file, in which the file meta information usually ends."""
LONG_VRS = (b"OB", b"OW", b"UN", b"UT", b"SQ")
SHORT_VRS = (b"UL", b"UI", b"SH", b"AE", b"US", b"LO", b"CS", b"DA", b"TM")
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
PROCESSED = ("MR", "CR", "DX")
"""Modalities whose DERIVED\\PRIMARY images are acquisitions that the device processed, such as most of CR."""


def read_headers(path: Path, modalities: Sequence[str], released: bool = False) -> list[DicomHeader]:
    """Read and check a file's header without its pixels: one entry, or one for each frame of an enhanced image.

    Args:
        modalities: accepted values of DICOM Modality (0008,0060).
        released: a person has checked the pixels for burned-in text.

    Raises:
        ScanRejected: the file cannot be used.
    """
    dataset = _read_dataset(path, stop_before_pixels=True)
    with rejecting(path):
        _check_header(path, dataset, modalities, released)
        return headers_of(path, dataset)


def read_dicom(
    path: Path, modalities: Sequence[str], released: bool = False, frame: int | None = None
) -> tuple[DicomHeader, np.ndarray]:
    """Read one image: its header and float32 pixels `(H,W)` in real values, higher is brighter.

    Applies the modality LUT or rescale, sets padding to the lowest real value (to NaN in an image of padding alone),
    inverts MONOCHROME1 about the middle of its stored range, and applies no window. `frame` is that of an enhanced
    image; the others are as for `read_headers`.
    """
    headers, pixels = read_frames(path, modalities, released, frame)
    return headers[0], pixels[0]


def read_frames(
    path: Path, modalities: Sequence[str], released: bool = False, frame: int | None = None
) -> tuple[list[DicomHeader], list[np.ndarray]]:
    """All images of a file as `read_dicom` reads them, or the one at `frame`."""
    dataset = _read_dataset(path, stop_before_pixels=False)
    with rejecting(path):
        _check_header(path, dataset, modalities, released)
        check_decoder(path, dataset)
        check_encoded_size(path, dataset)
        headers = headers_of(path, dataset)
        wanted = headers if frame is None else [headers[frame]]
        stored = stored_pixels(dataset, frame)
        images = stored.reshape(-1, *stored.shape[-2:]) if stored.ndim in (2, 3) else stored
        if images.shape != (len(wanted), dataset.Rows, dataset.Columns):
            detail = "its pixel data do not have the size that its header gives"
            raise ScanRejected(path, Rejection.UNREADABLE, detail)
        return wanted, [
            real_values(path, of_frame(dataset, header.frame), image)
            for header, image in zip(wanted, images, strict=True)
        ]


def _read_dataset(path: Path, stop_before_pixels: bool) -> Dataset:
    check_file(path)
    try:
        with rejecting(path):
            check_inflated(path)
            dataset = dcmread(path, stop_before_pixels=stop_before_pixels)
            _check_nesting(path, dataset)
            return _with_syntax(dataset)
    except ScanRejected as error:
        if isinstance(error.__cause__, InvalidDicomError):
            bare = _bare_dataset(path, stop_before_pixels)
            if bare is not None:
                return bare
            kind = foreign_kind(path) or "not a DICOM file"
            raise ScanRejected(path, Rejection.NOT_AN_IMAGE, kind) from error.__cause__
        raise


def check_inflated(path: Path) -> None:
    """Refuse a deflated file that unpacks to more than `MAX_FILE_BYTES`, without keeping what it unpacks to.

    Raises:
        ScanRejected: it does.
        InvalidDicomError: it is no DICOM file.
    """
    with path.open("rb", buffering=0) as stream:
        if _names_another_syntax(stream.read(HEAD_BYTES)):
            return
    meta = read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    with path.open("rb") as stream:
        # past the preamble, the prefix, and the element that holds the length
        stream.seek(128 + 4 + 12 + int(meta.FileMetaInformationGroupLength))
        inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while not inflater.eof and (chunk := inflater.unconsumed_tail or stream.read(INFLATED_AT_ONCE)):
            size += len(inflater.decompress(chunk, INFLATED_AT_ONCE))
            if size > MAX_FILE_BYTES:
                detail = f"it unpacks to more than the {MAX_FILE_BYTES} bytes that are read"
                raise ScanRejected(path, Rejection.TOO_LARGE, detail)


def _names_another_syntax(head: bytes) -> bool:
    """Whether the file meta information at the start of a file gives a transfer syntax that is not deflated.

    Of every file this is read, so pydicom's own reader, which takes a hundred times as long, is asked only where the
    elements do not lie as they should.
    """
    at, found = 132 if head[128:132] == b"DICM" else len(head), False
    while at + 12 <= len(head):
        if head[at : at + 2] != b"\x02\0":
            return found
        element, kind = int.from_bytes(head[at + 2 : at + 4], "little"), head[at + 4 : at + 6]
        long = kind in LONG_VRS
        if not long and kind not in SHORT_VRS:
            return False
        start = at + (12 if long else 8)
        end = start + int.from_bytes(head[at + 8 : start] if long else head[at + 6 : start], "little")
        if element == 0x10:
            if head[start:end].strip(b"\0 ") == DeflatedExplicitVRLittleEndian.encode():
                return False
            found = True
        at = end
    return False  # the elements are more than was read, or damaged


def _bare_dataset(path: Path, stop_before_pixels: bool) -> Dataset | None:
    """A data set without preamble and file meta information, as old programs and some exports write; else None."""
    with rejecting(path):
        with path.open("rb") as stream:
            if stream.read(2) not in (b"\x08\0", b"\x02\0"):  # the group that a data set begins with
                return None
        dataset = dcmread(path, stop_before_pixels=stop_before_pixels, force=True)
        if not dataset.get("SOPClassUID"):
            return None
        _check_nesting(path, dataset)
        return _with_syntax(dataset)


def _with_syntax(dataset: Dataset) -> Dataset:
    """The data set with the transfer syntax that it was read by, where its file does not say one."""
    if not dataset.file_meta.get("TransferSyntaxUID"):
        implicit, _ = dataset.original_encoding
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return dataset


def _check_nesting(path: Path, dataset: Dataset) -> None:
    waiting = [(dataset, 0)]
    while waiting:
        level, depth = waiting.pop()
        if depth > MAX_NESTING:
            raise ScanRejected(path, Rejection.TOO_LARGE, f"sequences are nested more than {MAX_NESTING} deep")
        sequences = [element.tag for element in level.values() if element.VR == "SQ"]
        for tag in sequences:
            waiting.extend((item, depth + 1) for item in level[tag].value)


def _check_header(path: Path, dataset: Dataset, modalities: Sequence[str], released: bool) -> None:
    if not all(dataset.get(name) for name in ("Rows", "Columns", "BitsAllocated")):
        raise ScanRejected(path, Rejection.NOT_AN_IMAGE, "a DICOM object without pixels")
    if text(dataset, "Modality") not in modalities:
        raise ScanRejected(path, Rejection.WRONG_MODALITY, f"DICOM Modality is not {' or '.join(modalities)}")
    if text(dataset, "SyntheticData") == "YES":
        raise ScanRejected(path, Rejection.SYNTHETIC, "SyntheticData is YES: only real scans are read")
    check_slice_size(path, int(dataset.Rows), int(dataset.Columns))
    frames = int(dataset.get("NumberOfFrames") or 1)
    if int(dataset.Rows) * int(dataset.Columns) * frames > MAX_PIXELS:
        detail = f"{dataset.Rows} x {dataset.Columns} x {frames} pixels, at most {MAX_PIXELS} are read"
        raise ScanRejected(path, Rejection.TOO_LARGE, detail)
    places = len(items(dataset, "PerFrameFunctionalGroupsSequence"))
    if frames > 1 and not places:
        detail = "several frames without a place for each: convert it to classic single-frame DICOM or NIfTI (dcm2niix)"
        raise ScanRejected(path, Rejection.UNSUPPORTED, detail)
    if places not in (0, frames):
        raise ScanRejected(path, Rejection.UNREADABLE, f"{frames} frames, and a place for {places} of them")
    if "MOSAIC" in image_type_of(dataset):
        detail = "a mosaic of many slices in one picture: convert it to NIfTI (dcm2niix)"
        raise ScanRejected(path, Rejection.UNSUPPORTED, detail)
    if text(dataset, "PresentationIntentType") == "FOR PROCESSING":
        detail = "FOR PROCESSING: the detector's raw values; take the image FOR PRESENTATION"
        raise ScanRejected(path, Rejection.UNSUPPORTED, detail)
    if "LOCALIZER" in image_type_of(dataset):
        raise ScanRejected(path, Rejection.LOCALIZER, "its ImageType is LOCALIZER: it shows where the scan was taken")
    grey = dataset.get("PhotometricInterpretation") in ("MONOCHROME1", "MONOCHROME2")
    if dataset.get("SamplesPerPixel", 1) != 1 or not grey:
        raise ScanRejected(path, Rejection.UNSUPPORTED, "not a grey image")
    if dataset.BitsAllocated not in (8, 16) or not 1 <= int(dataset.BitsStored) <= dataset.BitsAllocated:
        raise ScanRejected(path, Rejection.UNSUPPORTED, "its pixels do not have 8 or 16 bits")
    if not released:
        _check_burned_in(path, dataset)


def _check_burned_in(path: Path, dataset: Dataset) -> None:
    kind = image_type_of(dataset)
    suspicions = {
        "BurnedInAnnotation is not NO": str(dataset.get("BurnedInAnnotation", "NO")).upper() != "NO",
        "a secondary capture": str(dataset.get("SOPClassUID", "")).startswith(SECONDARY_CAPTURE),
        "ImageType is DERIVED": "DERIVED" in kind
        and (dataset.get("Modality") not in PROCESSED or "PRIMARY" not in kind),
        "an ultrasound image without BurnedInAnnotation": (
            dataset.get("Modality") == "US" and "BurnedInAnnotation" not in dataset
        ),
    }
    present = [suspicion for suspicion, true in suspicions.items() if true]
    if present:
        raise ScanRejected(path, Rejection.BURNED_IN, f"{', '.join(present)}: check it by hand")
