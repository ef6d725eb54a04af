"""NIfTI volumes: read checked and in millimetres, written without a word of whom they show."""

from __future__ import annotations

import logging
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import logger
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError, HeaderTypeError

from ld_common.core.errors import ScanError
from ld_common.imaging.geometry import Frame, Scan
from ld_common.imaging.rejection import MAX_PIXELS, Refusal, ScanRefused, check_file, check_spacing, refusing

NIFTI = (".nii", ".nii.gz")
SYNTHETIC_NIFTI = "synthetic"
"""How the description of every NIfTI file that is written here starts."""
MILLIMETRES = {"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 0.001}
DESCRIPTION_BYTES = 79
GEOMETRY = (
    *("dim", "pixdim", "xyzt_units", "qform_code", "sform_code"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
"""All that is copied of a header: the others may name the patient."""
logger.setLevel(logging.CRITICAL)  # it prints what it mends in a header, and such a header is refused here


def read_nifti(path: Path) -> Nifti1Image:
    """One grey volume as the file holds it, its voxels not read yet; `affine_mm` says where they lie.

    Raises:
        ScanRefused: whatever keeps it from being used, voxel sizes that are none among it.
    """
    check_file(path)
    with refusing(path, ImageFileError, HeaderDataError, HeaderTypeError):
        volume = nibabel.load(path)
        if not isinstance(volume, Nifti1Image):
            raise ScanRefused(path, Refusal.UNSUPPORTED, "not a NIfTI image")
        _check_voxels(path, volume)
        _check_sizes(path, volume)
        return volume


def affine_mm(volume: Nifti1Image) -> np.ndarray:
    """`(4,4)`: voxel -> millimetres to the right, to the front, up, whatever the unit of the file."""
    affine = np.array(volume.affine, np.float64)
    affine[:3] *= MILLIMETRES[volume.header.get_xyzt_units()[0]]
    return affine


def write_nifti(path: Path, pixels: np.ndarray, frame: Frame | Scan) -> None:
    """Write real values `(H,W)` as a canonical volume of one slice that lies where the input's slice lay.

    Raises:
        ScanError: the input had no position in space, or the file cannot be written.
    """
    if frame.affine is None:
        raise ScanError(f"cannot write '{path}': the input says no position in space; write .png or .dcm instead")
    volume = nibabel.as_closest_canonical(Nifti1Image(pixels.astype(np.float32).T[..., None], frame.affine))
    volume.header.set_xyzt_units("mm")
    _save(path, volume, SYNTHETIC_NIFTI)


def write_nifti_like(
    path: Path, voxels: np.ndarray, affine: np.ndarray, source: Nifti1Image | None, description: str
) -> None:
    """Write real values `(I,J,K)` in the very geometry of `source`: shape, affine, voxel sizes, unit and codes.

    Args:
        source: the file that the voxels came from; None where that was no NIfTI, and `affine`, in mm, says it all.
        description: is cut to the 79 characters that a header holds, the word synthetic before it included.

    Raises:
        ScanError: the file cannot be written.
    """
    if source is None:
        volume = Nifti1Image(voxels.astype(np.float32), affine)
        volume.header.set_xyzt_units("mm")
    else:
        header: Nifti1Header = type(source.header)()
        for name in GEOMETRY:
            header[name] = source.header[name]
        header.set_data_dtype(np.float32)
        volume = type(source)(voxels.astype(np.float32).reshape(source.shape), source.affine, header)
    _save(path, volume, f"{SYNTHETIC_NIFTI} {description}"[:DESCRIPTION_BYTES])


def _save(path: Path, volume: Nifti1Image, description: str) -> None:
    volume.header["descrip"] = description.encode("ascii", "replace")
    try:
        nibabel.save(volume, path)
    except OSError as error:
        raise ScanError(f"cannot write '{path}': {error.strerror or error}") from error


def _check_voxels(path: Path, volume: Nifti1Image) -> None:
    if volume.ndim < 3 or max(volume.shape[3:], default=1) > 1:
        raise ScanRefused(path, Refusal.UNSUPPORTED, f"its shape is {volume.shape}: one volume is expected")
    if np.prod(volume.shape, dtype=np.float64) > MAX_PIXELS:
        raise ScanRefused(path, Refusal.TOO_LARGE, f"its shape is {volume.shape}, at most {MAX_PIXELS} voxels are read")
    if min(volume.shape) < 1 or volume.get_data_dtype().kind not in "iuf":
        raise ScanRefused(path, Refusal.UNSUPPORTED, f"voxels of type {volume.get_data_dtype()}: grey is expected")
    if bytes(volume.header["descrip"].item()).startswith(SYNTHETIC_NIFTI.encode()):
        raise ScanRefused(path, Refusal.SYNTHETIC, "its description says synthetic: only real scans are read")


def _check_sizes(path: Path, volume: Nifti1Image) -> None:
    with ImageOpener(str(path)) as stream:  # nibabel mends sizes of 0 and below in silence
        sizes = type(volume.header).from_fileobj(stream, check=False)["pixdim"][1:4]
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        said = ", ".join(f"{size:g}" for size in sizes)
        raise ScanRefused(path, Refusal.WRONG_GEOMETRY, f"its voxel sizes are {said}: write it with the real ones")
    if not np.isfinite(volume.affine).all() or np.linalg.matrix_rank(volume.affine) < 4:
        raise ScanRefused(path, Refusal.WRONG_GEOMETRY, "its affine is singular: write it with a valid one")
    check_spacing(path, nibabel.affines.voxel_sizes(affine_mm(volume)))
