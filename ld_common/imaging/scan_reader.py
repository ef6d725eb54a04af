"""Reads the slice that a study uses from DICOM, a NIfTI volume or a grey PNG or JPEG."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Image
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from PIL import Image

from ld_common.core.errors import RequestError
from ld_common.imaging.dicom import read_dicom, read_headers
from ld_common.imaging.dicom_header import DicomHeader
from ld_common.imaging.foreign_files import is_jpeg
from ld_common.imaging.geometry import Scan
from ld_common.imaging.modality import PROJECTION, Attributes, ImageConfig, Modality
from ld_common.imaging.nifti import NIFTI, affine_mm, read_nifti, read_slice, read_thinned
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
from ld_common.imaging.series import Series, affine_of, grouped, ordered, read_voxels_of

Source = Path | Sequence[Path]
"""A file, a folder of one DICOM series, or the files of one."""
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Axis of the body along a plane's normal: to the right, to the front, up."""
TURNED = {"axial": "LPS", "coronal": "LIA", "sagittal": "PIR"}
"""Directions of columns, rows and slices of a plane, as it is looked at."""
DICOM_LETTERS = {"L": "L", "P": "P", "I": "F"}
PICTURES = (".png", ".jpg", ".jpeg")
FOREGROUND = 0.1
"""Share of the bright end of a volume above which a voxel is the patient, not air."""
LEAST_AREA = 0.05
"""Of the largest slice's foreground: a slice with less holds nothing of the body part."""
LONGER = 1.2
"""A stack this much longer than its body part shows more than the part."""


def decode_scan(
    source: Source,
    modality: Modality,
    slice_index: int | None = None,
    released: bool = False,
    headers: Sequence[DicomHeader] | None = None,
) -> Scan:
    """The slice that `modality.image` takes, or the one at `slice_index`, of one scan.

    A slice of another plane than the acquisition's is cut through the stacked volume. Axial slices are turned so that
    rows run to the patient's back and columns to the left, coronal ones so that rows run to the feet and columns to
    the left, sagittal ones so that rows run to the feet and columns to the back, radiographs as coronal ones. A PNG or
    JPEG has one slice and no spacing.

    Args:
        source: DICOM file, folder of one DICOM series, its files, NIfTI volume, or grey PNG or JPEG.
        modality: its `image` options choose the slice.
        slice_index: from 0, the lowest (axial), hindmost (coronal) or leftmost (sagittal) slice.
        released: a person has checked the pixels for burned-in text; else a header that speaks of text is refused.
        headers: of the images of a DICOM source that make the scan, where they are known: frames of a file and files
            that are not among them play no part, and no header is read twice.

    Raises:
        ScanRejected: it cannot be used; a `ScanError` with the reason's kind.
    """
    if headers is not None:
        return _series_scan(headers[0].path, headers, modality, slice_index, released)
    if not isinstance(source, Path):
        return _series_scan(source[0], headers_of(source, modality, released), modality, slice_index, released)
    with rejecting(source):
        folder = source.is_dir()
    if folder:
        headers = series_headers(source, modality, released)
        return _series_scan(source, headers, modality, slice_index, released)
    name = source.name.lower()
    if name.endswith(NIFTI):
        return _nifti_scan(source, modality, slice_index)
    if name.endswith(PICTURES):
        slice_number(source, 1, 0.0, slice_index)
        return _picture_scan(source, modality)
    headers = headers_of([source], modality, released)
    return _series_scan(source, headers, modality, slice_index, released)


def series_headers(folder: Path, modality: Modality, released: bool) -> list[DicomHeader]:
    """Headers of the one series in a folder, by file name; skips files of other kinds and localizers.

    Raises:
        ScanRejected: none or several series, or an image that cannot be used.
    """
    with rejecting(folder):
        files = sorted(path for path in folder.iterdir() if path.is_file())
    headers = headers_of(files, modality, released, (Rejection.NOT_AN_IMAGE, Rejection.LOCALIZER))
    if not headers:
        raise ScanRejected(folder, Rejection.NOT_AN_IMAGE, "the folder holds no DICOM image; give a file or a series")
    series = grouped(headers)
    if len(series) > 1:
        raise ScanRejected(folder, Rejection.UNSUPPORTED, f"the folder holds {len(series)} series: give one, or a file")
    return headers


def headers_of(
    files: Sequence[Path], modality: Modality, released: bool, skipped: Sequence[Rejection] = ()
) -> list[DicomHeader]:
    """Headers of the images in DICOM files, in their order; raises `ScanRejected` unless the reason is `skipped`."""
    headers = []
    for file in files:
        try:
            headers += read_headers(file, modality.dicom_modalities, released)
        except ScanRejected as error:
            if error.rejection not in skipped:
                raise
    return headers


def _series_scan(
    path: Path, headers: Sequence[DicomHeader], modality: Modality, slice_index: int | None, released: bool
) -> Scan:
    """The scan of one series; of several projections, there is no telling which one is meant."""
    if modality.image.plane == PROJECTION:
        distinct = {header.sop_uid or str(header.path) for header in headers}
        if len(distinct) > 1:
            detail = f"the folder holds {len(distinct)} images: give one"
            raise ScanRejected(path, Rejection.UNSUPPORTED, detail)
        series = Series([headers[0]], [])
    else:
        series = ordered(path, headers)
        series.check_whole(path)
        for header in series.headers:
            if header.affine is None:
                detail = (
                    "no usable PixelSpacing, ImageOrientationPatient and ImagePositionPatient: its plane is unknown"
                )
                raise ScanRejected(header.path, Rejection.WRONG_GEOMETRY, detail)
    first = series.headers[0]
    problem = unfit(first, modality)
    if problem is not None:
        raise ScanRejected(first.path, *problem)
    check_spacing(first.path, first.spacing_mm or ())
    if modality.image.plane == PROJECTION:
        slice_number(path, 1, 0.0, slice_index)
        scan = _projection(first, modality, released)
    else:
        scan = _slice_of(path, series, modality, slice_index, released)
    return replace(
        scan,
        patient_id=first.patient_id,
        study_date=first.study_date,
        frame_of_reference=first.frame_of_reference,
    )


def unfit(header: DicomHeader, modality: Modality) -> tuple[Rejection, str] | None:
    """Why an image's view or body part is none of the modality's, as far as its header says them."""
    image = modality.image
    if image.view_positions and header.view_position and header.view_position not in image.view_positions:
        return Rejection.WRONG_GEOMETRY, f"its view is not {' or '.join(image.view_positions)}"
    fits = any(fnmatch.fnmatchcase(header.body_part, pattern.upper()) for pattern in image.body_parts)
    if image.body_parts and header.body_part and not fits:
        return Rejection.WRONG_GEOMETRY, f"its Body Part Examined is not {' or '.join(image.body_parts)}"
    return None


def _projection(header: DicomHeader, modality: Modality, released: bool) -> Scan:
    _, pixels = read_dicom(header.path, modality.dicom_modalities, released, header.frame)
    if not np.isfinite(pixels).all():
        raise ScanRejected(header.path, Rejection.UNREADABLE, "it holds no image: only padding")
    pixels = _without_sentinel(pixels)
    attributes = known_attributes(header, modality)
    if header.affine is not None:
        return Scan(pixels, header.spacing_mm, attributes, header.affine)
    return _upright_scan(pixels, header, attributes)


def _slice_of(path: Path, series: Series, modality: Modality, slice_index: int | None, released: bool) -> Scan:
    """The slice of a series in the modality's plane: one of its images, or one cut through their volume."""
    image, attributes = modality.image, known_attributes(series.headers[0], modality)
    own_plane = series.plane_axis == AXES[image.plane]
    if own_plane and (slice_index is not None or not _shows_more(image, series.step_mm * len(series.headers))):
        chosen = series.at(path, image.slice_position, slice_index)
        _, pixels = read_dicom(chosen.path, modality.dicom_modalities, released, chosen.frame)
        return _plane_scan(chosen.path, Nifti1Image(pixels.T[..., None], chosen.affine), attributes, image.plane)
    if len(series.headers) < 2:
        raise ScanRejected(path, Rejection.WRONG_GEOMETRY, f"its slice is not {image.plane}")
    affine = affine_of(path, series)
    voxels = read_voxels_of(path, series, modality.dicom_modalities, released)
    return volume_scan(path, Nifti1Image(voxels, affine), affine, image, slice_index, attributes)


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
        if modality.image.plane == PROJECTION:
            if min(volume.shape[:3]) > 1:
                detail = "a volume; a two-dimensional image is expected"
                raise ScanRejected(path, Rejection.WRONG_GEOMETRY, detail)
            config = replace(modality.image, plane="axial", part_mm=0.0)
            return volume_scan(path, volume, affine_mm(volume), config, slice_index, {})
        return volume_scan(path, volume, affine_mm(volume), modality.image, slice_index, {})


def volume_scan(
    path: Path,
    volume: Nifti1Image,
    affine: np.ndarray,
    image: ImageConfig,
    slice_index: int | None,
    attributes: Attributes,
) -> Scan:
    """The slice of a volume at `slice_index`, or where `image` takes it; raises `ScanRejected` where there is none."""
    axes = io_orientation(affine)
    across = int(np.flatnonzero(axes[:, 0] == AXES[image.plane])[0])
    slices, upwards = volume.shape[across], axes[across, 1] > 0
    if slices == 1 and AXES[image.plane] != int(axes[int(np.argmin(volume.shape[:3])), 0]):
        raise ScanRejected(path, Rejection.WRONG_GEOMETRY, f"its slice is not {image.plane}")
    check_slice_size(path, *(length for axis, length in enumerate(volume.shape[:3]) if axis != across))
    step_mm = float(nibabel.affines.voxel_sizes(affine)[across])
    if slice_index is None and _shows_more(image, step_mm * slices):
        voxels = np.moveaxis(read_thinned(volume, across), across, 0)
        chosen = _in_part(voxels if upwards else voxels[::-1], step_mm, image)
    else:
        chosen = slice_number(path, slices, image.slice_position, slice_index)
    place = chosen if upwards else slices - 1 - chosen
    return _plane_scan(path, read_slice(volume, affine, across, place), attributes, image.plane)


def _shows_more(image: ImageConfig, extent_mm: float) -> bool:
    return image.part_mm > 0 and extent_mm > LONGER * image.part_mm


def _in_part(slices: np.ndarray, step_mm: float, image: ImageConfig) -> int:
    """Index of the slice at `slice_position` of the body part, which ends where air begins above it.

    Args:
        slices: `(slices,...)` from below.
        step_mm: their distance.
        image: length of the part and position of the slice in it.
    """
    finite = np.where(np.isfinite(slices), slices, 0)
    bright = float(np.percentile(finite, 99.5))
    areas = (finite > FOREGROUND * bright).reshape(len(slices), -1).mean(1)
    shown = np.flatnonzero(areas > LEAST_AREA * areas.max())
    if not len(shown):
        shown = np.arange(len(slices))  # one grey level: nothing tells where the part ends
    top = int(shown[-1])
    bottom = max(int(shown[0]), round(top - image.part_mm / step_mm))
    return int(np.floor(bottom + image.slice_position * (top - bottom) + 0.5))


def _plane_scan(path: Path, image: Nifti1Image, attributes: Attributes, plane: str) -> Scan:
    """The scan of a one-slice volume, turned as its plane is looked at."""
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(TURNED[plane]))
    values = np.asarray(nibabel.orientations.apply_orientation(np.asarray(image.dataobj), turn))
    if values.shape[2] != 1:
        raise ScanRejected(path, Rejection.WRONG_GEOMETRY, f"its slices are not {plane}")
    values = values[..., 0].T
    finite = np.isfinite(values)
    if not finite.any():
        raise ScanRejected(path, Rejection.UNREADABLE, "its slice holds no finite number")
    pixels = _without_sentinel(np.where(finite, values, values[finite].min()).astype(np.float32))
    affine = image.affine @ inv_ornt_aff(turn, image.shape[:3])
    column_mm, row_mm = map(float, nibabel.affines.voxel_sizes(affine)[:2])
    columns, rows = (DICOM_LETTERS[letter] for letter in TURNED[plane][:2])
    return Scan(np.ascontiguousarray(pixels), (row_mm, column_mm), attributes, affine, (columns, rows))


def _without_sentinel(pixels: np.ndarray) -> np.ndarray:
    """Pixels whose lowest value, where it is no signal, became the next one.

    Programs that mask write a value such as -32768, and some padding is not declared; black is then not air. A lowest
    value counts so if it is negative and lies apart from all others by more than half of their range.
    """
    low = pixels.min()
    if low >= 0:
        return pixels
    rest = pixels[pixels > low]
    if rest.size and rest.min() - low > max(0.5 * (rest.max() - rest.min()), 1e-6):
        return np.maximum(pixels, rest.min())
    return pixels


def _picture_scan(path: Path, modality: Modality) -> Scan:
    """A PNG or a JPEG: one image without a place or a spacing."""
    check_file(path)
    with rejecting(path, SyntaxError):
        if is_jpeg(path) and path.suffix.lower() == ".png":
            raise ScanRejected(path, Rejection.UNREADABLE, "a JPEG image named .png: rename it to .jpg")
        with _picture(path) as image:
            check_slice_size(path, image.height, image.width)
            if image.info.get("SyntheticData") == "YES":
                detail = "its text says SyntheticData=YES: only real scans are read"
                raise ScanRejected(path, Rejection.SYNTHETIC, detail)
            if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
                detail = "its EXIF data say that it is turned: write it upright"
                raise ScanRejected(path, Rejection.UNSUPPORTED, detail)
            pixels = np.asarray(image)
            if image.mode == "RGB" and (pixels == pixels[..., :1]).all():
                pixels = pixels[..., 0]  # grey, written as colour
            elif image.mode not in ("L", "I", "I;16"):
                detail = f"a {image.format} of mode {image.mode}: 8 or 16 bit grey is expected"
                raise ScanRejected(path, Rejection.UNSUPPORTED, detail)
            orientation = None if modality.image.plane == PROJECTION else ("L", "P")
            return Scan(pixels.astype(np.float32), None, {}, None, orientation)


EXIF_ORIENTATION = 0x0112


def _picture(path: Path) -> Image.Image:
    try:
        return Image.open(path, formats=["JPEG" if path.suffix.lower() != ".png" else "PNG"])
    except Image.DecompressionBombError as error:
        detail = f"more pixels than the {MAX_SLICE_PIXELS} that are read"
        raise ScanRejected(path, Rejection.TOO_LARGE, detail) from error
