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
from pydicom.filereader import read_dataset, read_file_meta_info
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from ld_common.imaging.dicom_checks import check_header
from ld_common.imaging.dicom_header import DicomHeader, headers_of, of_frame
from ld_common.imaging.dicom_meta import HEAD_BYTES, PLAIN, read_meta
from ld_common.imaging.dicom_pixels import check_decoder, check_encoded_size, real_values, stored_pixels
from ld_common.imaging.foreign_files import foreign_kind
from ld_common.imaging.rejection import (
    MAX_FILE_BYTES,
    Rejection,
    ScanRejected,
    check_file,
    rejecting,
)

MAX_NESTING = 16
INFLATED_AT_ONCE = 2**20
FIRST_GROUP = b"\x08\0"
"""Of the elements of a data set."""
PIXELS = frozenset((0x7FE00008, 0x7FE00009, 0x7FE00010))
"""Tags of pixels of floating point, of double precision, and of whole numbers."""


def read_headers(path: Path, modalities: Sequence[str], released: bool = False) -> list[DicomHeader]:
    """Read and check a file's header without its pixels: one entry, or one for each frame of an enhanced image.

    Args:
        modalities: accepted values of DICOM Modality (0008,0060).
        released: a person has checked the pixels for burned-in text.

    Raises:
        ScanRejected: the file cannot be used.
    """
    dataset = _read_plain_header(path)
    if dataset is None:
        dataset = _read_dataset(path, stop_before_pixels=True)
    with rejecting(path):
        check_header(path, dataset, modalities, released)
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
        check_header(path, dataset, modalities, released)
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


def _read_plain_header(path: Path) -> Dataset | None:
    """The header of a file whose meta information lies as it should, without that; None for any other file.

    It is what pydicom's `dcmread` gives, which also judges each element of the meta information.
    """
    check_file(path)
    with rejecting(path), path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
        meta = read_meta(head)
        if meta is None or meta.syntax not in PLAIN or head[meta.end : meta.end + 2] != FIRST_GROUP:
            return None
        stream.seek(meta.end)
        dataset = read_dataset(stream, meta.is_implicit, True, stop_when=lambda tag, *_: tag in PIXELS)
        _check_nesting(path, dataset)
        return dataset


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
        found = read_meta(stream.read(HEAD_BYTES))
    if found is not None and not found.is_deflated:
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


def _bare_dataset(path: Path, stop_before_pixels: bool) -> Dataset | None:
    """A data set without preamble and file meta information, as old programs and some exports write; else None."""
    with rejecting(path):
        with path.open("rb") as stream:
            if stream.read(2) not in (FIRST_GROUP, b"\x02\0"):  # the group that a data set begins with
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
