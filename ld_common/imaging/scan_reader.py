"""Reads the slice that a study uses from a DICOM file, a DICOM series, a NIfTI volume or a grey PNG."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Image
from PIL import Image

from ld_common.core.errors import RequestError
from ld_common.imaging.dicom import DicomHeader, choose_slice, read_dicom, read_header
from ld_common.imaging.geometry import Scan
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.nifti import NIFTI, affine_mm, read_nifti, read_slice
from ld_common.imaging.rejection import (
    MAX_SLICE_PIXELS,
    Rejection,
    ScanRejected,
    check_file,
    check_slice_size,
    check_spacing,
    rejecting,
    slice_number,
)


def decode_scan(path: Path, modality: Modality, slice_index: int | None = None, released: bool = False) -> Scan:
    """The slice that `modality.image` takes, or the one at `slice_index`, of a file or a folder of one series.

    Axial slices are turned so that rows run to the patient's back and columns to the left, radiographs so that rows run
    to the feet and columns to the left. A PNG has one slice and no spacing.

    Args:
        path: DICOM file, folder of one DICOM series, NIfTI volume or grey PNG.
        modality: its `image` options choose the slice.
        slice_index: from 0, the lowest slice, upwards along the normal.
        released: a person has checked the pixels for burned-in text; else a header that speaks of text is refused.

    Raises:
        ScanRejected: the file cannot be used; a `ScanError` with the reason's kind.
    """
    with rejecting(path):
        folder = path.is_dir()
    if folder:
        headers = series_headers(path, modality, released)
        return _dicom_scan(choose_slice(headers, modality.image.slice_position, slice_index).path, modality, released)
    if path.name.lower().endswith(NIFTI):
        return _nifti_scan(path, modality, slice_index)
    slice_number(path, 1, 0.0, slice_index)
    if path.suffix.lower() == ".png":
        return _png_scan(path, modality)
    return _dicom_scan(path, modality, released)


def series_headers(folder: Path, modality: Modality, released: bool) -> list[DicomHeader]:
    """Headers of the one series in a folder, by file name; skips other files. Raises `ScanRejected`."""
    headers = []
    with rejecting(folder):
        files = sorted(path for path in folder.iterdir() if path.is_file())
    for file in files:
        try:
            headers.append(read_header(file, modality.dicom_modalities, released))
        except ScanRejected as error:
            if error.rejection != Rejection.NOT_AN_IMAGE:
                raise
    series = {header.series_uid for header in headers}
    if not headers:
        raise ScanRejected(folder, Rejection.NOT_AN_IMAGE, "the folder holds no DICOM image; give a file or a series")
    if len(series) > 1:
        raise ScanRejected(folder, Rejection.UNSUPPORTED, f"the folder holds {len(series)} series: give one, or a file")
    return headers


def _dicom_scan(path: Path, modality: Modality, released: bool) -> Scan:
    header, pixels = read_dicom(path, modality.dicom_modalities, released)
    scan = _placed_scan(path, modality, header, pixels)
    return replace(
        scan,
        patient_id=header.patient_id,
        study_date=header.study_date,
        frame_of_reference=header.frame_of_reference,
    )


def _placed_scan(path: Path, modality: Modality, header: DicomHeader, pixels: np.ndarray) -> Scan:
    check_spacing(path, header.spacing_mm or ())
    attributes = known_attributes(header, modality)
    if modality.image.plane == "none":
        views = modality.image.view_positions
        if views and header.view_position and header.view_position not in views:
            raise ScanRejected(path, Rejection.WRONG_GEOMETRY, f"its View Position is not {' or '.join(views)}")
        if header.affine is not None:
            return Scan(pixels, header.spacing_mm, attributes, header.affine)
        return _upright_scan(pixels, header, attributes)
    if header.affine is None:
        detail = "no usable PixelSpacing, ImageOrientationPatient and ImagePositionPatient: its plane is not known"
        raise ScanRejected(path, Rejection.WRONG_GEOMETRY, detail)
    return _axial_scan(path, Nifti1Image(pixels.T[..., None], header.affine), attributes)


def _upright_scan(pixels: np.ndarray, header: DicomHeader, attributes: Attributes) -> Scan:
    """A projection with columns to the left and rows to the feet, as far as the file gives its orientation."""
    spacing, orientation = header.spacing_mm, header.orientation
    if orientation is not None and orientation[0] in "HF":
        pixels, orientation = pixels.T, orientation[::-1]
        spacing = None if spacing is None else spacing[::-1]
    if orientation is not None and orientation[0] == "R":
        pixels, orientation = pixels[:, ::-1], ("L", orientation[1])
    if orientation is not None and orientation[1] == "H":
        pixels, orientation = pixels[::-1], (orientation[0], "F")
    return Scan(np.ascontiguousarray(pixels), spacing, attributes, None, orientation)


def known_attributes(header: DicomHeader, modality: Modality) -> Attributes:
    """The modality's attributes that a header gives with a value known to the modality."""
    attributes: Attributes = {}
    texts = {"age": "" if header.age_years is None else str(header.age_years), "sex": header.sex}
    for name, text in texts.items():
        try:
            attributes[name] = modality.parse(name, text)
        except RequestError:
            continue  # not an attribute or a value of this modality
    return attributes


def _nifti_scan(path: Path, modality: Modality, slice_index: int | None) -> Scan:
    volume = read_nifti(path)
    with rejecting(path):
        axes = nibabel.io_orientation(affine_mm(volume))
        across = int(np.flatnonzero(axes[:, 0] == 2)[0])
        slices = volume.shape[across]
        if modality.image.plane == "none" and slices > 1:
            raise ScanRejected(path, Rejection.WRONG_GEOMETRY, "a volume; a two-dimensional image is expected")
        check_slice_size(path, *(length for axis, length in enumerate(volume.shape[:3]) if axis != across))
        chosen = slice_number(path, slices, modality.image.slice_position, slice_index)
        chosen = chosen if axes[across, 1] > 0 else slices - 1 - chosen
        return _axial_scan(path, read_slice(volume, across, chosen), {})


def _axial_scan(path: Path, image: Nifti1Image, attributes: Attributes) -> Scan:
    """The scan of a one-slice volume, rows to the back and columns to the left."""
    canonical = nibabel.as_closest_canonical(image)
    if canonical.shape[2] != 1:
        raise ScanRejected(path, Rejection.WRONG_GEOMETRY, "its slices are not axial")
    values = np.asarray(canonical.dataobj, np.float32)[::-1, ::-1, 0].T
    finite = np.isfinite(values)
    if not finite.any():
        raise ScanRejected(path, Rejection.UNREADABLE, "its slice holds no finite number")
    pixels = np.where(finite, values, values[finite].min())
    height, width = pixels.shape
    turn = np.diag([-1.0, -1.0, 1.0, 1.0])
    turn[:2, 3] = width - 1, height - 1
    column_mm, row_mm = map(float, nibabel.affines.voxel_sizes(canonical.affine)[:2])
    return Scan(pixels, (row_mm, column_mm), attributes, canonical.affine @ turn, ("L", "P"))


def _png_scan(path: Path, modality: Modality) -> Scan:
    check_file(path)
    with rejecting(path, SyntaxError), _png(path) as image:
        check_slice_size(path, image.height, image.width)
        if image.mode not in ("L", "I", "I;16"):
            raise ScanRejected(path, Rejection.UNSUPPORTED, f"PNG of mode {image.mode}: 8 or 16 bit grey is expected")
        if image.info.get("SyntheticData") == "YES":
            raise ScanRejected(path, Rejection.SYNTHETIC, "its text says SyntheticData=YES: only real scans are read")
        orientation = None if modality.image.plane == "none" else ("L", "P")
        return Scan(np.asarray(image, np.float32), None, {}, None, orientation)


def _png(path: Path) -> Image.Image:
    try:
        return Image.open(path, formats=["PNG"])
    except Image.DecompressionBombError as error:
        detail = f"more pixels than the {MAX_SLICE_PIXELS} that are read"
        raise ScanRejected(path, Rejection.TOO_LARGE, detail) from error
