"""Reads classic single-frame grey DICOM images, which may be damaged or hostile: every fault raises `ScanRejected`.

`DicomHeader` is an allow-list: no other header element is read.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.encaps import generate_frames
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_modality_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import RE_VALID_UID, DeflatedExplicitVRLittleEndian, RLELossless

from ld_common.imaging.codestreams import codestream_shape, rle_lengths
from ld_common.imaging.rejection import (
    MAX_FILE_BYTES,
    MAX_PIXELS,
    Rejection,
    ScanRejected,
    check_file,
    check_slice_size,
    rejecting,
    slice_number,
)

MAX_DEFLATED_BYTES = MAX_FILE_BYTES // 1032  # deflate expands 1032-fold at most
MAX_NESTING = 16
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


@dataclass(frozen=True, eq=False)
class DicomHeader:
    """The header elements that are read. They name the patient, so they stay in memory at the site."""

    path: Path
    patient_id: str
    study_date: datetime.date | None
    age_years: float | None
    sex: str
    series_uid: str
    series_number: int | None
    series_description: str
    sop_uid: str
    sop_class: str
    spacing_mm: tuple[float, float] | None
    """Distance between rows and between columns."""
    affine: np.ndarray | None
    """`(4,4)`: (column, row, 0, 1) -> millimetres to the right, to the front, up; None without usable geometry."""
    position_mm: float | None
    """Position along the slice's normal."""
    view_position: str
    """View Position of a projection, for example PA or LL; empty if absent."""
    orientation: tuple[str, str] | None
    """Patient Orientation: directions of rows and columns, for example ("L", "F"), of an image without `affine`."""
    frame_of_reference: str = ""
    """UID of the coordinate system; empty if absent or malformed."""


def read_header(path: Path, modalities: Sequence[str], released: bool = False) -> DicomHeader:
    """Read and check a header without its pixels.

    Args:
        modalities: accepted values of DICOM Modality (0008,0060).
        released: a person has checked the pixels for burned-in text.

    Raises:
        ScanRejected: the file cannot be used.
    """
    dataset = _read_dataset(path, stop_before_pixels=True)
    with rejecting(path):
        _check_header(path, dataset, modalities, released)
        return _header(path, dataset)


def read_dicom(path: Path, modalities: Sequence[str], released: bool = False) -> tuple[DicomHeader, np.ndarray]:
    """Read one image: its header and float32 pixels `(H,W)` in real values, higher is brighter.

    Applies the modality LUT or rescale, sets padding to the lowest real value, inverts MONOCHROME1 about the middle of
    its stored range, and applies no window. Arguments and errors as for `read_header`.
    """
    dataset = _read_dataset(path, stop_before_pixels=False)
    with rejecting(path):
        _check_header(path, dataset, modalities, released)
        _check_decoder(path, dataset)
        _check_encoded_size(path, dataset)
        return _header(path, dataset), _real_values(path, dataset)


def choose_slice(headers: Sequence[DicomHeader], fraction: float, index: int | None = None) -> DicomHeader:
    """The slice at `fraction` (0 to 1) of a series, or at `index`, ordered along the normal.

    Raises:
        ScanRejected: a slice without a position, or no slice of that index.
    """
    unplaced = [header for header in headers if header.position_mm is None]
    if unplaced and len(headers) > 1:
        detail = "no usable position or orientation: the series cannot be sorted"
        raise ScanRejected(unplaced[0].path, Rejection.WRONG_GEOMETRY, detail)
    places = {round(header.position_mm or 0.0, 3): header for header in sorted(headers, key=_sop_uid, reverse=True)}
    ordered = [places[place] for place in sorted(places)]
    return ordered[slice_number(headers[0].path, len(ordered), fraction, index)]


def _sop_uid(header: DicomHeader) -> str:
    return header.sop_uid


def _read_dataset(path: Path, stop_before_pixels: bool) -> Dataset:
    check_file(path)
    try:
        with rejecting(path):
            syntax = read_file_meta_info(path).get("TransferSyntaxUID")
            if syntax == DeflatedExplicitVRLittleEndian and path.stat().st_size > MAX_DEFLATED_BYTES:
                detail = f"deflated files are read up to {MAX_DEFLATED_BYTES} bytes; write it without compression"
                raise ScanRejected(path, Rejection.TOO_LARGE, detail)
            dataset = dcmread(path, stop_before_pixels=stop_before_pixels)
            _check_nesting(path, dataset)
            return dataset
    except ScanRejected as error:
        if isinstance(error.__cause__, InvalidDicomError):
            raise ScanRejected(path, Rejection.NOT_AN_IMAGE, "not a DICOM file") from error.__cause__
        raise


def _check_nesting(path: Path, dataset: Dataset) -> None:
    waiting = [(dataset, 0)]
    while waiting:
        level, depth = waiting.pop()
        if depth > MAX_NESTING:
            raise ScanRejected(path, Rejection.TOO_LARGE, f"sequences are nested more than {MAX_NESTING} deep")
        for tag in list(level.keys()):
            if level.get_item(tag).VR == "SQ":
                waiting.extend((item, depth + 1) for item in level[tag].value)


def _check_header(path: Path, dataset: Dataset, modalities: Sequence[str], released: bool) -> None:
    if not all(dataset.get(name) for name in ("Rows", "Columns", "BitsAllocated")):
        raise ScanRejected(path, Rejection.NOT_AN_IMAGE, "a DICOM object without pixels")
    if dataset.get("Modality") not in modalities:
        raise ScanRejected(path, Rejection.WRONG_MODALITY, f"DICOM Modality is not {' or '.join(modalities)}")
    if str(dataset.get("SyntheticData", "")).upper() == "YES":
        raise ScanRejected(path, Rejection.SYNTHETIC, "SyntheticData is YES: only real scans are read")
    check_slice_size(path, int(dataset.Rows), int(dataset.Columns))
    frames = int(dataset.get("NumberOfFrames") or 1)
    if int(dataset.Rows) * int(dataset.Columns) * frames > MAX_PIXELS:
        detail = f"{dataset.Rows} x {dataset.Columns} x {frames} pixels, at most {MAX_PIXELS} are read"
        raise ScanRejected(path, Rejection.TOO_LARGE, detail)
    if frames > 1 or "PerFrameFunctionalGroupsSequence" in dataset:
        detail = "multi-frame: convert it to classic single-frame DICOM or to NIfTI (dcm2niix)"
        raise ScanRejected(path, Rejection.UNSUPPORTED, detail)
    grey = dataset.get("PhotometricInterpretation") in ("MONOCHROME1", "MONOCHROME2")
    if dataset.get("SamplesPerPixel", 1) != 1 or not grey:
        raise ScanRejected(path, Rejection.UNSUPPORTED, "not a grey image")
    if dataset.BitsAllocated not in (8, 16) or not 1 <= int(dataset.BitsStored) <= dataset.BitsAllocated:
        raise ScanRejected(path, Rejection.UNSUPPORTED, "its pixels do not have 8 or 16 bits")
    if not released:
        _check_burned_in(path, dataset)


def _check_burned_in(path: Path, dataset: Dataset) -> None:
    suspicions = {
        "BurnedInAnnotation is not NO": str(dataset.get("BurnedInAnnotation", "NO")).upper() != "NO",
        "a secondary capture": str(dataset.get("SOPClassUID", "")).startswith(SECONDARY_CAPTURE),
        "ImageType is DERIVED": "DERIVED" in [str(word).upper() for word in _words(dataset.get("ImageType"))],
        "an ultrasound image without BurnedInAnnotation": (
            dataset.get("Modality") == "US" and "BurnedInAnnotation" not in dataset
        ),
    }
    present = [suspicion for suspicion, true in suspicions.items() if true]
    if present:
        raise ScanRejected(path, Rejection.BURNED_IN, f"{', '.join(present)}: check it by hand")


def _check_decoder(path: Path, dataset: Dataset) -> None:
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise ScanRejected(path, Rejection.UNSUPPORTED, f"no decoder exists for '{syntax.name}'") from error
    if not decoder.is_available:
        remedy = "; or ".join(decoder.missing_dependencies)
        raise ScanRejected(path, Rejection.NO_DECODER, f"'{syntax.name}' needs a decoder: {remedy}")


def _check_encoded_size(path: Path, dataset: Dataset) -> None:
    """Refuse compressed pixels that unpack to another size than the header gives, before a decoder reserves memory."""
    syntax, shape = dataset.file_meta.TransferSyntaxUID, (int(dataset.Rows), int(dataset.Columns))
    if not syntax.is_encapsulated:
        return
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    if syntax == RLELossless:
        length = shape[0] * shape[1]
        fits = all(size <= length + 1 for size in rle_lengths(frame, length))  # an odd length is padded
    else:
        found = codestream_shape(frame)
        fits = found is None or found == shape  # a stream without a size fails in its decoder
    if not fits:
        detail = "its compressed pixels do not have the size that its header gives"
        raise ScanRejected(path, Rejection.UNREADABLE, detail)


def _real_values(path: Path, dataset: Dataset) -> np.ndarray:
    stored = np.asarray(pixel_array(dataset))
    if stored.shape != (dataset.Rows, dataset.Columns):
        raise ScanRejected(path, Rejection.UNREADABLE, "its pixel data do not have the size that its header gives")
    padding = _padding(dataset, stored)
    values = np.asarray(apply_modality_lut(stored, dataset), np.float32)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        signed, bits = bool(dataset.PixelRepresentation), int(dataset.BitsStored)
        lowest = -(2 ** (bits - 1)) if signed else 0
        ends = np.array([[lowest, lowest + 2**bits - 1]], np.int32)
        values = np.float32(np.asarray(apply_modality_lut(ends, dataset), np.float64).sum()) - values
    if padding.all() or not np.isfinite(values).all():
        raise ScanRejected(path, Rejection.UNREADABLE, "it holds no image: only padding, or values that are not finite")
    values[padding] = values[~padding].min()
    return values


def _padding(dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    limit = dataset.get("PixelPaddingRangeLimit")
    ends = sorted((int(value), int(value if limit is None else limit)))
    return (stored >= ends[0]) & (stored <= ends[1])


def _header(path: Path, dataset: Dataset) -> DicomHeader:
    spacing = _spacing(dataset)
    affine, position = _geometry(dataset, spacing)
    number = dataset.get("SeriesNumber")
    return DicomHeader(
        path=path,
        patient_id=str(dataset.get("PatientID") or "").strip(),
        study_date=_date(dataset.get("StudyDate")),
        age_years=_age(dataset),
        sex=str(dataset.get("PatientSex") or "").strip().upper(),
        series_uid=str(dataset.get("SeriesInstanceUID") or ""),
        series_number=None if number is None else int(number),
        series_description=str(dataset.get("SeriesDescription") or ""),
        sop_uid=str(dataset.get("SOPInstanceUID") or ""),
        sop_class=str(dataset.get("SOPClassUID") or ""),
        spacing_mm=spacing,
        affine=affine,
        position_mm=position,
        view_position=str(dataset.get("ViewPosition") or "").strip().upper(),
        orientation=_orientation(dataset),
        frame_of_reference=_uid(dataset.get("FrameOfReferenceUID")),
    )


def _uid(value: Any) -> str:
    text = str(value or "").strip()
    return text if len(text) <= 64 and re.fullmatch(RE_VALID_UID, text) else ""


def _spacing(dataset: Dataset) -> tuple[float, float] | None:
    numbers = _numbers(dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing"), 2)
    return None if numbers is None or min(numbers) <= 0 else (numbers[0], numbers[1])


def _geometry(dataset: Dataset, spacing: tuple[float, float] | None) -> tuple[np.ndarray | None, float | None]:
    cosines = _numbers(dataset.get("ImageOrientationPatient"), 6)
    origin = _numbers(dataset.get("ImagePositionPatient"), 3)
    if cosines is None or origin is None or spacing is None:
        return None, None
    along_row, along_column = np.array(cosines[:3]), np.array(cosines[3:])
    basis = np.stack([along_row, along_column, np.cross(along_row, along_column)], 1)
    if not np.allclose(basis.T @ basis, np.eye(3), atol=1e-2):
        return None, None
    affine = np.eye(4)
    affine[:3, :3] = basis * np.array([spacing[1], spacing[0], 1.0])
    affine[:3, 3] = origin
    affine[:2] *= -1  # DICOM axes point left and back
    return affine, float(basis[:, 2] @ np.array(origin))


def _orientation(dataset: Dataset) -> tuple[str, str] | None:
    # "LH" leans to the head: the first letter is the main direction
    letters = [str(word).strip().upper()[:1] for word in _words(dataset.get("PatientOrientation"))]
    return (letters[0], letters[1]) if len(letters) == 2 and set(letters) <= set("LRAPHF") else None


def _age(dataset: Dataset) -> float | None:
    text = str(dataset.get("PatientAge") or "").strip().upper()
    units = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
    if text[-1:] in units and text[:-1].isdigit():
        return int(text[:-1]) * units[text[-1]]
    born, seen = _date(dataset.get("PatientBirthDate")), _date(dataset.get("StudyDate"))
    return (seen - born).days / 365.25 if born and seen and seen >= born else None


def _date(value: Any) -> datetime.date | None:
    text = str(value or "").strip().replace(".", "")  # ACR-NEMA wrote 2004.01.19
    try:
        return datetime.date.fromisoformat(text) if len(text) == 8 and text.isdigit() else None
    except ValueError:
        return None


def _words(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _numbers(value: Any, count: int) -> list[float] | None:
    numbers = [float(number) for number in _words(value)]
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None
