"""Reads grey DICOM images, which may be damaged or hostile: every fault raises `ScanRejected`.

A classic file is one image; an enhanced one (Enhanced MR) has several frames, each with a place of its own.
`DicomHeader` is an allow-list: no other header element is read.
"""

from __future__ import annotations

import datetime
import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.encaps import generate_frames
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_modality_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import (
    RE_VALID_UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from ld_common.imaging.codestreams import codestream_shape, rle_lengths
from ld_common.imaging.dicom_elements import date, decimal, decimals, items, text, texts, whole
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
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
PROCESSED = ("MR", "CR", "DX")
"""Modalities whose DERIVED\\PRIMARY images are acquisitions that the device processed, such as most of CR."""
FRAMED = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PixelData")
LATERAL = "LATERAL"
VIEWS = {"postero-anterior": "PA", "antero-posterior": "AP", "frontal": "AP", "lateral": LATERAL}
"""View Position by words in the meaning of a view's code."""
LATERAL_WORDS = re.compile(r"(?<![A-Z])(LAT|LATERAL|SEITL|SEITLICH)(?![A-Z])")
FRONTAL_WORDS = re.compile(r"(?<![A-Z])(PA|AP|FRONTAL)(?![A-Z])")
"""Words of a description; one that has both kinds names a study, not an image."""


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
    """View Position of a projection, for example PA or LL, or LATERAL by its view code, orientation or description;
    empty if nothing says it."""
    orientation: tuple[str, str] | None
    """Patient Orientation: directions of rows and columns, for example ("L", "F"), of an image without `affine`."""
    frame_of_reference: str = ""
    """UID of the coordinate system; empty if absent or malformed."""
    study_uid: str = ""
    image_type: str = ""
    """Image Type in upper case, its words separated by slashes."""
    echo_ms: float | None = None
    """Echo time."""
    time_point: str = ""
    """What tells apart images that were taken again at one place: temporal position, acquisition, diffusion weight."""
    body_part: str = ""
    """Body Part Examined in upper case."""
    frame: int | None = None
    """Of a file with several images, from 0."""


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
        return _headers(path, dataset)


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
        _check_decoder(path, dataset)
        _check_encoded_size(path, dataset)
        headers = _headers(path, dataset)
        wanted = headers if frame is None else [headers[frame]]
        stored = np.asarray(pixel_array(dataset)) if frame is None else np.asarray(pixel_array(dataset, index=frame))
        images = stored.reshape(-1, *stored.shape[-2:]) if stored.ndim in (2, 3) else stored
        if images.shape != (len(wanted), dataset.Rows, dataset.Columns):
            detail = "its pixel data do not have the size that its header gives"
            raise ScanRejected(path, Rejection.UNREADABLE, detail)
        return wanted, [
            _real_values(path, _of_frame(dataset, header.frame), image)
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
            raise ScanRejected(
                path, Rejection.NOT_AN_IMAGE, foreign_kind(path) or "not a DICOM file"
            ) from error.__cause__
        raise


def check_inflated(path: Path) -> None:
    """Refuse a deflated file that unpacks to more than `MAX_FILE_BYTES`, without keeping what it unpacks to.

    Raises:
        ScanRejected: it does.
        InvalidDicomError: it is no DICOM file.
    """
    meta = read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    with path.open("rb") as stream:
        stream.seek(
            128 + 4 + 12 + int(meta.FileMetaInformationGroupLength)
        )  # preamble, prefix, and the element that holds the length
        inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while not inflater.eof and (chunk := inflater.unconsumed_tail or stream.read(INFLATED_AT_ONCE)):
            size += len(inflater.decompress(chunk, INFLATED_AT_ONCE))
            if size > MAX_FILE_BYTES:
                detail = f"it unpacks to more than the {MAX_FILE_BYTES} bytes that are read"
                raise ScanRejected(path, Rejection.TOO_LARGE, detail)


def _bare_dataset(path: Path, stop_before_pixels: bool) -> Dataset | None:
    """A data set without preamble and file meta information, as old programs and some exports write; else None."""
    with rejecting(path):
        content = path.read_bytes()
        if content[:2] not in (b"\x08\0", b"\x02\0") and content[:4] != b"DICM":
            return None
        try:
            dataset = dcmread(io.BytesIO(content), stop_before_pixels=stop_before_pixels, force=True)
        except InvalidDicomError:
            return None
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
    places = len(items(dataset, "PerFrameFunctionalGroupsSequence"))
    if frames > 1 and not places:
        detail = "several frames without a place for each: convert it to classic single-frame DICOM or NIfTI (dcm2niix)"
        raise ScanRejected(path, Rejection.UNSUPPORTED, detail)
    if places not in (0, frames):
        raise ScanRejected(path, Rejection.UNREADABLE, f"{frames} frames, and a place for {places} of them")
    if "MOSAIC" in _image_type(dataset):
        detail = "a mosaic of many slices in one picture: convert it to NIfTI (dcm2niix)"
        raise ScanRejected(path, Rejection.UNSUPPORTED, detail)
    if text(dataset, "PresentationIntentType") == "FOR PROCESSING":
        detail = "FOR PROCESSING: the detector's raw values; take the image FOR PRESENTATION"
        raise ScanRejected(path, Rejection.UNSUPPORTED, detail)
    if "LOCALIZER" in _image_type(dataset):
        raise ScanRejected(path, Rejection.LOCALIZER, "its ImageType is LOCALIZER: it shows where the scan was taken")
    grey = dataset.get("PhotometricInterpretation") in ("MONOCHROME1", "MONOCHROME2")
    if dataset.get("SamplesPerPixel", 1) != 1 or not grey:
        raise ScanRejected(path, Rejection.UNSUPPORTED, "not a grey image")
    if dataset.BitsAllocated not in (8, 16) or not 1 <= int(dataset.BitsStored) <= dataset.BitsAllocated:
        raise ScanRejected(path, Rejection.UNSUPPORTED, "its pixels do not have 8 or 16 bits")
    if not released:
        _check_burned_in(path, dataset)


def _check_burned_in(path: Path, dataset: Dataset) -> None:
    kind = _image_type(dataset)
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
    for frame in generate_frames(dataset.PixelData, number_of_frames=int(dataset.get("NumberOfFrames") or 1)):
        if syntax == RLELossless:
            length = shape[0] * shape[1]
            fits = all(size <= length + 1 for size in rle_lengths(frame, length))  # an odd length is padded
        else:
            found = codestream_shape(frame)
            fits = found is None or found == shape  # a stream without a size fails in its decoder
        if not fits:
            detail = "its compressed pixels do not have the size that its header gives"
            raise ScanRejected(path, Rejection.UNREADABLE, detail)


def _real_values(path: Path, dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    """Real values of one image; `dataset` has the elements of its frame."""
    padding = _padding(dataset, stored)
    values = np.asarray(_rescaled(path, dataset, stored), np.float32)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        signed, bits = bool(dataset.PixelRepresentation), int(dataset.BitsStored)
        lowest = -(2 ** (bits - 1)) if signed else 0
        ends = np.array([[lowest, lowest + 2**bits - 1]], np.int32)
        values = np.float32(np.asarray(_rescaled(path, dataset, ends), np.float64).sum()) - values
    if not np.isfinite(values).all():
        raise ScanRejected(path, Rejection.UNREADABLE, "it holds values that are not finite")
    # a slice of nothing but padding, beside a head, becomes the lowest value of its volume
    values[padding] = np.nan if padding.all() else values[~padding].min()
    return values


def _rescaled(path: Path, dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    """Stored values after the modality LUT, or after slope and intercept, which are 1 and 0 where they are empty."""
    if items(dataset, "ModalityLUTSequence"):
        return np.asarray(apply_modality_lut(stored, dataset))
    slope, intercept = decimal(dataset, "RescaleSlope"), decimal(dataset, "RescaleIntercept")
    for keyword, number in (("RescaleSlope", slope), ("RescaleIntercept", intercept)):
        if number is None and texts(dataset, keyword):
            raise ScanRejected(path, Rejection.UNREADABLE, f"its {keyword} is no number")
    if slope is None and intercept is None:
        return stored
    return stored.astype(np.float64) * (1.0 if slope is None else slope) + (intercept or 0.0)


def _padding(dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    value, limit = (_stored_value(dataset, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if value is None:
        return np.zeros(stored.shape, bool)
    ends = sorted((value, value if limit is None else limit))
    return (stored >= ends[0]) & (stored <= ends[1])


def _stored_value(dataset: Dataset, keyword: str) -> int | None:
    """A pixel value of the header in the pixels' own type: some write -2000 as the unsigned 63536."""
    value = whole(dataset, keyword)
    bits = int(dataset.BitsAllocated)
    if value is not None and dataset.PixelRepresentation and value >= 2 ** (bits - 1):
        return value - 2**bits
    if value is not None and not dataset.PixelRepresentation and value < 0:
        return value + 2**bits
    return value


def _headers(path: Path, dataset: Dataset) -> list[DicomHeader]:
    frames = len(items(dataset, "PerFrameFunctionalGroupsSequence"))
    if not frames:
        return [_header(path, dataset, None)]
    return [_header(path, _of_frame(dataset, frame), frame) for frame in range(frames)]


def _of_frame(dataset: Dataset, frame: int | None) -> Dataset:
    """The elements of one frame of an enhanced image: its own, those that all frames share, and the file's."""
    if frame is None:
        return dataset
    together = Dataset()
    together.update({element.tag: element for element in dataset if element.keyword not in FRAMED})
    shared, own = dataset.get("SharedFunctionalGroupsSequence"), dataset.PerFrameFunctionalGroupsSequence[frame]
    for groups in [*(shared or []), own]:
        for group in groups:
            for item in items(groups, group.keyword) if group.VR == "SQ" else ():
                together.update({element.tag: element for element in item})
    if "EffectiveEchoTime" in together:
        together.EchoTime = together.EffectiveEchoTime
    if "FrameType" in together:
        together.ImageType = together.FrameType
    if "TemporalPositionIndex" in together:
        together.TemporalPositionIdentifier = together.TemporalPositionIndex
    return together


def _header(path: Path, dataset: Dataset, frame: int | None) -> DicomHeader:
    spacing = _spacing(path, dataset)
    affine, position = _geometry(dataset, spacing)
    # the study's date is that of the visit; where it is empty, those of acquisition and series are it
    seen = date(dataset, "StudyDate", "AcquisitionDate", "AcquisitionDateTime", "SeriesDate")
    return DicomHeader(
        path=path,
        patient_id=str(dataset.get("PatientID") or "").strip(),
        study_date=seen,
        age_years=_age(dataset, seen),
        sex=text(dataset, "PatientSex"),
        series_uid=str(dataset.get("SeriesInstanceUID") or ""),
        series_number=whole(dataset, "SeriesNumber"),
        series_description=str(dataset.get("SeriesDescription") or ""),
        sop_uid=_sop_uid(dataset, frame),
        sop_class=str(dataset.get("SOPClassUID") or ""),
        spacing_mm=spacing,
        affine=affine,
        position_mm=position,
        view_position=_view(dataset),
        orientation=_orientation(dataset),
        frame_of_reference=_uid(dataset.get("FrameOfReferenceUID")),
        study_uid=_uid(dataset.get("StudyInstanceUID")),
        image_type="/".join(_image_type(dataset)),
        echo_ms=decimal(dataset, "EchoTime"),
        time_point=_time_point(dataset),
        body_part=_body_part(dataset),
        frame=frame,
    )


def _sop_uid(dataset: Dataset, frame: int | None) -> str:
    found = str(dataset.get("SOPInstanceUID") or "")
    return found if frame is None or not found else f"{found}#{frame}"


def _image_type(dataset: Dataset) -> list[str]:
    return [word.upper() for word in texts(dataset, "ImageType")]


def _time_point(dataset: Dataset) -> str:
    names = {
        "TemporalPositionIdentifier": "time point",
        "AcquisitionNumber": "acquisition",
        "DiffusionBValue": "b",
        "TriggerTime": "trigger",
    }
    return ", ".join(f"{word} {value}" for name, word in names.items() if (value := text(dataset, name)))


def _view(dataset: Dataset) -> str:
    """View Position, or what the view's code, the orientation or the description say."""
    position = text(dataset, "ViewPosition")
    if position:
        return LATERAL if position == "LAT" else position
    for item in items(dataset, "ViewCodeSequence"):
        meaning = str(item.get("CodeMeaning") or "").lower().replace("posteroanterior", "postero-anterior")
        meaning = meaning.replace("anteroposterior", "antero-posterior")
        for words, view in VIEWS.items():
            if words in meaning:
                return view
    directions = {word.upper()[:1] for word in texts(dataset, "PatientOrientation")}
    described = f"{dataset.get('SeriesDescription') or ''} {dataset.get('ProtocolName') or ''}".upper()
    said = LATERAL_WORDS.search(described) is not None and FRONTAL_WORDS.search(described) is None
    return LATERAL if said or directions & {"A", "P"} else ""


def _body_part(dataset: Dataset) -> str:
    regions = (str(item.get("CodeMeaning") or "") for item in items(dataset, "AnatomicRegionSequence"))
    return text(dataset, "BodyPartExamined") or next(regions, "").upper()


def _uid(value: object) -> str:
    found = str(value or "").strip()
    return found if len(found) <= 64 and re.fullmatch(RE_VALID_UID, found) else ""


def _spacing(path: Path, dataset: Dataset) -> tuple[float, float] | None:
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        numbers = decimals(dataset, keyword, 2)
        if numbers is None and texts(dataset, keyword):
            raise ScanRejected(path, Rejection.WRONG_GEOMETRY, f"its {keyword} does not hold two numbers")
        if numbers is not None and min(numbers) > 0:
            return numbers[0], numbers[1]
    shape = decimals(dataset, "PixelAspectRatio", 2)
    if shape is not None and shape[0] != shape[1]:
        detail = "its pixels are not square (PixelAspectRatio) and no spacing says how large they are: resample it"
        raise ScanRejected(path, Rejection.WRONG_GEOMETRY, detail)
    return None


def _geometry(dataset: Dataset, spacing: tuple[float, float] | None) -> tuple[np.ndarray | None, float | None]:
    cosines = decimals(dataset, "ImageOrientationPatient", 6)
    origin = decimals(dataset, "ImagePositionPatient", 3)
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
    letters = [word.upper()[:1] for word in texts(dataset, "PatientOrientation")]
    return (letters[0], letters[1]) if len(letters) == 2 and set(letters) <= set("LRAPHF") else None


def _age(dataset: Dataset, seen: datetime.date | None) -> float | None:
    stated = text(dataset, "PatientAge")
    units = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
    if stated[-1:] in units and stated[:-1].isdigit():
        return int(stated[:-1]) * units[stated[-1]]
    born = date(dataset, "PatientBirthDate")
    return (seen - born).days / 365.25 if born and seen and seen >= born else None
