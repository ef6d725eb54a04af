"""What is read of a DICOM header: identity, dates, geometry, view, and what tells an image from others at its place."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.uid import RE_VALID_UID

from ld_common.imaging.dicom_elements import date, decimal, decimals, decoded, items, text, texts, uid, whole
from ld_common.imaging.rejection import Rejection, ScanRejected

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


def headers_of(path: Path, dataset: Dataset) -> list[DicomHeader]:
    frames = len(items(dataset, "PerFrameFunctionalGroupsSequence"))
    if not frames:
        return [_header(path, dataset, None)]
    return [_header(path, of_frame(dataset, frame), frame) for frame in range(frames)]


def of_frame(dataset: Dataset, frame: int | None) -> Dataset:
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
        patient_id=decoded(dataset, "PatientID").strip(),
        study_date=seen,
        age_years=_age(dataset, seen),
        sex=text(dataset, "PatientSex"),
        series_uid=uid(dataset, "SeriesInstanceUID"),
        series_number=whole(dataset, "SeriesNumber"),
        series_description=decoded(dataset, "SeriesDescription"),
        sop_uid=_sop_uid(dataset, frame),
        sop_class=uid(dataset, "SOPClassUID"),
        spacing_mm=spacing,
        affine=affine,
        position_mm=position,
        view_position=_view(dataset),
        orientation=_orientation(dataset),
        frame_of_reference=_valid(uid(dataset, "FrameOfReferenceUID")),
        study_uid=_valid(uid(dataset, "StudyInstanceUID")),
        image_type="/".join(image_type_of(dataset)),
        echo_ms=decimal(dataset, "EchoTime"),
        time_point=_time_point(dataset),
        body_part=_body_part(dataset),
        frame=frame,
    )


def _sop_uid(dataset: Dataset, frame: int | None) -> str:
    found = uid(dataset, "SOPInstanceUID")
    return found if frame is None or not found else f"{found}#{frame}"


def image_type_of(dataset: Dataset) -> list[str]:
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
    described = f"{decoded(dataset, 'SeriesDescription')} {decoded(dataset, 'ProtocolName')}".upper()
    said = LATERAL_WORDS.search(described) is not None and FRONTAL_WORDS.search(described) is None
    return LATERAL if said or directions & {"A", "P"} else ""


def _body_part(dataset: Dataset) -> str:
    regions = (str(item.get("CodeMeaning") or "") for item in items(dataset, "AnatomicRegionSequence"))
    return text(dataset, "BodyPartExamined") or next(regions, "").upper()


def _valid(found: str) -> str:
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
    (a, b, c), (d, e, f) = cosines[:3], cosines[3:]
    basis = np.stack([along_row, along_column, (b * f - c * e, c * d - a * f, a * e - b * d)], 1)
    if np.abs(basis.T @ basis - np.eye(3)).max() > 1e-2:
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
