"""Writes synthetic images as DICOM secondary captures that every relevant element declares synthetic.

They hold no identity, no date and no reference to the scan they came from, unless a `Place` names its frame.
"""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from highdicom import ContributingEquipment
from highdicom.sc import SCImage
from pydicom.sr.codedict import codes
from pydicom.uid import UID, ExplicitVRLittleEndian
from pydicom.valuerep import format_number_as_ds

from ld_common import __version__
from ld_common.core.errors import ScanError

MANUFACTURER = "Latent Drift Federation"
LEVELS = 65000
"""Stored levels between the lowest and the highest value."""
TIMES_OF_WRITING = (
    *("InstanceCreationDate", "InstanceCreationTime", "ContentDate", "ContentTime"),
    *("DateOfSecondaryCapture", "TimeOfSecondaryCapture"),
)


@dataclass(frozen=True, eq=False)
class Place:
    """Position of one slice in space."""

    number: int
    """Instance Number, from 1."""
    affine: np.ndarray
    """`(4,4)`: (column, row, 0, 1) -> millimetres to the right, to the front, up."""
    distance_mm: float | None
    """To the next slice; None for a single one."""
    values: tuple[float, float]
    """Lowest and highest value of the whole series, so that all slices share one scale."""
    origin: str
    """Origin of its pixels, for the derivation description."""
    frame_of_reference: str = ""
    """UID of the coordinate system, which links the image to the scan that has the same; empty for an invented one."""


@dataclass(frozen=True)
class Provenance:
    """What drew an image. Equal provenance and pixels give equal bytes; files that share it share a study."""

    model_name: str
    model_digest: str
    """SHA-256 of the release's adapter."""
    seed: int
    request: str
    """Identifies the request; its hash goes into the UIDs, so it must hold no patient identifier."""


def write_synthetic_dicom(
    path: Path,
    pixels: np.ndarray,
    spacing_mm: tuple[float, float] | None,
    description: str,
    provenance: Provenance,
    *,
    orientation: tuple[str, str] | None = ("L", "P"),
    marked: bool = False,
    place: Place | None = None,
) -> None:
    """Write real values `(H,W)` as a 16-bit secondary capture, exact to half a stored level.

    The same arguments give the same bytes. Files of one `request`, `seed` and model share a study and an invented
    patient.

    Args:
        spacing_mm: distance between rows and between columns, or None.
        description: of the image, for example "counterfactual: age=84"; the series description takes its first 64
            characters.
        provenance: the generating model, seed and request.
        orientation: directions of rows and columns, as in `Scan`; None if unknown.
        marked: whether words are burned into the pixels.
        place: position in space. Slices of one request share a frame of reference, and those of one
            request and description a series.

    Raises:
        ScanError: values that are not finite, or a file that cannot be written.
    """
    if not np.isfinite(pixels).all():
        raise ScanError(f"cannot write '{path}': some pixels are not finite")
    drawn_by = [provenance.request, str(provenance.seed), provenance.model_name, provenance.model_digest]
    study = hashlib.sha256("\n".join(drawn_by).encode()).hexdigest()
    low, high = (float(pixels.min()), float(pixels.max())) if place is None else place.values
    number = 1 if place is None else place.number
    what = f"{pixels.shape}{spacing_mm}" + ("" if place is None else f" slice {number}")
    content = hashlib.sha256(pixels.astype("<f4").tobytes() + what.encode()).hexdigest()
    stored, slope, intercept = _quantise(pixels.astype(np.float64), low, high)
    image = _secondary_capture(stored, spacing_mm, study, content, description, provenance.model_name, number)
    # type 2C: empty if unknown, which highdicom does not offer
    image.PatientOrientation = list(orientation or ())
    image.ContributingEquipmentSequence.insert(0, _equipment(provenance.model_name, provenance.model_digest))
    made = description if place is None else f"{description}; {place.origin}"
    origin = f"synthesised by {provenance.model_name}, SHA-256 {provenance.model_digest}, seed {provenance.seed}"
    _declare_synthetic(image, f"{made}; {origin}")
    image.BurnedInAnnotation = "YES" if marked else "NO"
    _set_values(image, low, high, slope, intercept)
    if place is not None:
        _set_place(image, place, UID(place.frame_of_reference) or _uid("frame of reference", study))
    try:
        image.save_as(path, enforce_file_format=True)
    except OSError as error:
        raise ScanError(f"cannot write '{path}': {error.strerror or error}") from error


def _secondary_capture(
    stored: np.ndarray,
    spacing_mm: tuple[float, float] | None,
    study: str,
    content: str,
    description: str,
    model_name: str,
    number: int,
) -> SCImage:
    return SCImage(
        stored,
        "MONOCHROME2",
        bits_allocated=16,
        coordinate_system="PATIENT",
        study_instance_uid=_uid("study", study),
        series_instance_uid=_uid("series", study, description),
        series_number=1,
        sop_instance_uid=_uid("instance", study, description, content),
        instance_number=number,
        manufacturer=MANUFACTURER,
        patient_id=f"SYNTHETIC-{study[:16]}",
        patient_name=f"SYNTHETIC^{study[:16]}",
        patient_orientation=("L", "P"),
        pixel_spacing=spacing_mm,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        manufacturer_model_name=model_name[:64],
        software_versions=__version__,
        series_description=description[:64],
        content_qualification="RESEARCH",
        specific_character_set="ISO_IR 192",
    )


def _quantise(pixels: np.ndarray, low: float, high: float) -> tuple[np.ndarray, str, str]:
    """Stored uint16 values, and the slope and intercept as DICOM writes them."""
    slope = format_number_as_ds((high - low) / LEVELS if high > low else 1.0)
    # room at both ends: 16 characters hold neither number exactly
    intercept = format_number_as_ds(low - 100 * float(slope))
    stored = np.round((pixels - float(intercept)) / float(slope))
    return np.clip(stored, 0, 65535).astype(np.uint16), slope, intercept


def _declare_synthetic(image: SCImage, derivation: str) -> None:
    image.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    image.SyntheticData = "YES"
    image.ContentQualification = "RESEARCH"
    image.DerivationDescription = derivation[:1024]
    image.Laterality = ""  # type 2C: required, though a picture of both sides has none
    # highdicom writes the current time, but the same request must give the same bytes
    for name in TIMES_OF_WRITING:
        if name in image:
            del image[name]
    for equipment in image.ContributingEquipmentSequence:
        equipment.pop("ContributionDateTime", None)


def _set_values(image: SCImage, low: float, high: float, slope: str, intercept: str) -> None:
    image.RescaleSlope, image.RescaleIntercept, image.RescaleType = slope, intercept, "US"
    image.WindowCenter = format_number_as_ds((low + high) / 2)
    image.WindowWidth = format_number_as_ds(max(high - low, 1.0))


def _set_place(image: SCImage, place: Place, frame_of_reference: UID) -> None:
    """Set the image plane and frame of reference, which a secondary capture may have."""
    directions = place.affine[:3, :2] / np.linalg.norm(place.affine[:3, :2], axis=0)
    away = np.array([-1.0, -1.0, 1.0])  # DICOM counts to the left and to the back
    image.FrameOfReferenceUID, image.PositionReferenceIndicator = frame_of_reference, ""
    image.ImagePositionPatient = [format_number_as_ds(float(value)) for value in away * place.affine[:3, 3]]
    image.ImageOrientationPatient = [format_number_as_ds(float(value)) for value in (away * directions.T).ravel()]
    image.SliceThickness = ""  # type 2
    if place.distance_mm is not None:
        image.SpacingBetweenSlices = image.SliceThickness = format_number_as_ds(place.distance_mm)


def _equipment(model_name: str, model_digest: str) -> ContributingEquipment:
    return ContributingEquipment(
        manufacturer=MANUFACTURER,
        purpose_of_reference=codes.DCM.SynthesizingEquipment,
        manufacturer_model_name=model_name[:64],
        software_versions=[__version__, model_digest[:64]],
    )


def _uid(*names: str) -> UID:
    return UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, '/'.join(['latent-drift-federation', *names])).int}")
