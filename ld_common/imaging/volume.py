"""Whole volumes: a NIfTI file or a folder of one DICOM series."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from ld_common.core.errors import ScanError
from ld_common.imaging.dicom_header import DicomHeader
from ld_common.imaging.geometry import Scan
from ld_common.imaging.modality import PROJECTION, Attributes, Modality
from ld_common.imaging.nifti import NIFTI, SLAB_VOXELS, affine_mm, read_nifti, read_voxels
from ld_common.imaging.rejection import Rejection, ScanRejected, check_slice_size, check_spacing, rejecting
from ld_common.imaging.scan_reader import PICTURES, Source, headers_of, known_attributes, series_headers
from ld_common.imaging.series import affine_of, ordered, read_voxels_of

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan's slices in the file's order, or by position for a DICOM series."""

    voxels: np.ndarray
    """float32 `(I,J,K)`, the first axis fastest, in the file's real values; values that are not finite became the
    lowest. (column, row, slice) for a DICOM series."""
    affine: np.ndarray
    """`(4,4)`: voxel -> millimetres to the right, to the front, up."""
    attributes_in_file: Attributes
    header: Nifti1Header | None
    """Of the NIfTI file it was read from; None for a DICOM series."""
    frame_of_reference: str = ""
    """As in `Scan`; empty where the slices have several."""
    patient_id: str = ""
    """As in `Scan`; empty where the slices have several."""
    study_date: datetime.date | None = None

    @property
    def upright(self) -> np.ndarray:
        """A view of `voxels` as axial slices from below, `(slices,H,W)`: rows run to the back, columns to the left."""
        return apply_orientation(self.voxels, self._turn).T

    @property
    def slice_mm(self) -> float:
        """Distance between the slices of `upright`."""
        return float(nibabel.affines.voxel_sizes(self.affine)[io_orientation(self.affine)[:, 0] == 2][0])

    @property
    def axial(self) -> bool:
        """Whether the file's own slices are axial; an MPRAGE often has sagittal ones."""
        return int(io_orientation(self.affine)[2, 0]) == 2

    def scan(self, index: int) -> Scan:
        """The axial slice at `index`, from 0, the lowest, upwards."""
        turned = self.affine @ inv_ornt_aff(self._turn, self.voxels.shape)
        affine = turned.copy()
        affine[:, 3] = turned @ (0, 0, index, 1)
        column_mm, row_mm = map(float, nibabel.affines.voxel_sizes(turned)[:2])
        pixels = np.ascontiguousarray(self.upright[index])
        return Scan(
            pixels,
            (row_mm, column_mm),
            self.attributes_in_file,
            affine,
            ("L", "P"),
            patient_id=self.patient_id,
            study_date=self.study_date,
        )

    def copied(self) -> Volume:
        """A copy whose voxels may be written to."""
        return replace(self, voxels=self.voxels.copy(order="F"))

    @property
    def _turn(self) -> np.ndarray:
        return ornt_transform(io_orientation(self.affine), axcodes2ornt("LPS"))


def decode_volume(source: Source, modality: Modality, released: bool = False) -> Volume:
    """Read a NIfTI file, the folder of a DICOM series, its files, or an enhanced DICOM file.

    `released` is as in `scan_reader.decode_scan`.

    Raises:
        ScanRejected: it cannot be used, for example because slices are missing, tilted or share a position.
    """
    path = source if isinstance(source, Path) else source[0]
    if modality.image.plane != "axial":
        trained = "two-dimensional images" if modality.image.plane == PROJECTION else f"{modality.image.plane} slices"
        detail = f"the release draws no volume: it was trained on {trained}"
        raise ScanRejected(path, Rejection.WRONG_GEOMETRY, detail)
    if not isinstance(source, Path):
        return _series(path, headers_of(source, modality, released), modality, released)
    with rejecting(path):
        folder = path.is_dir()
    if folder:
        return _series(path, series_headers(path, modality, released), modality, released)
    if not path.name.lower().endswith(NIFTI):
        headers = [] if path.name.lower().endswith(PICTURES) else headers_of([path], modality, released)
        if len(headers) < 2:
            detail = "not a volume: give a NIfTI file or a folder of one series"
            raise ScanRejected(path, Rejection.WRONG_GEOMETRY, detail)
        return _series(path, headers, modality, released)
    image = read_nifti(path)
    with rejecting(path):
        affine = affine_mm(image)
        _check_slices(path, image.shape[:3], affine)
        return _checked(path, Volume(read_voxels(image), affine, {}, image.header))


def _series(folder: Path, found: Sequence[DicomHeader], modality: Modality, released: bool) -> Volume:
    series = ordered(folder, found)
    series.check_whole(folder)
    headers, affine = series.headers, affine_of(folder, series)
    voxels = read_voxels_of(folder, series, modality.dicom_modalities, released)
    _check_slices(folder, voxels.shape, affine)
    volume = Volume(
        voxels,
        affine,
        known_attributes(headers[0], modality),
        None,
        _common((header.frame_of_reference for header in headers), ""),
        _common((header.patient_id for header in headers), ""),
        _common((header.study_date for header in headers), None),
    )
    return _checked(folder, volume)


def _common(values: Iterable[Value], otherwise: Value) -> Value:
    """The value that all slices have."""
    different = set(values)
    return different.pop() if len(different) == 1 else otherwise


def _check_slices(path: Path, shape: Sequence[int], affine: np.ndarray) -> None:
    """Refuse too large axial slices."""
    check_slice_size(
        path, *(length for axis, length in zip(io_orientation(affine)[:, 0], shape, strict=True) if axis != 2)
    )


def _checked(path: Path, volume: Volume) -> Volume:
    check_spacing(path, nibabel.affines.voxel_sizes(volume.affine))
    values = volume.voxels.ravel("F")  # a view
    slabs = [values[start : start + SLAB_VOXELS] for start in range(0, values.size, SLAB_VOXELS)]
    lowest = [slab[finite].min() for slab in slabs if (finite := np.isfinite(slab)).any()]
    if not lowest:
        raise ScanRejected(path, Rejection.UNREADABLE, "it holds no finite number")
    for slab in slabs:
        slab[~np.isfinite(slab)] = min(lowest)
    return volume


def check_same_grid(path: Path, volume: Volume, reference: Volume) -> None:
    """Raise `ScanError` unless the volume read from `path` has the grid of `reference`."""
    same_shape = volume.voxels.shape == reference.voxels.shape
    if not same_shape or not np.allclose(volume.affine, reference.affine, atol=1e-2):
        raise ScanError(
            f"the volume '{path}' has another grid, {' x '.join(map(str, volume.voxels.shape))} voxels: resample it to "
            f"the scan's {' x '.join(map(str, reference.voxels.shape))}"
        )
