"""Reads and checks NIfTI volumes, in millimetres, and writes them without anything that identifies the patient."""

from __future__ import annotations

import gzip
import logging
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.fileholders import FileHolder
from nibabel.imageglobals import logger
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.nifti2 import Nifti2Header, Nifti2Image
from nibabel.orientations import aff2axcodes
from nibabel.spatialimages import HeaderDataError, HeaderTypeError

from ld_common.core.errors import ScanError
from ld_common.imaging.foreign_files import foreign_kind, is_nifti
from ld_common.imaging.geometry import Frame, Scan
from ld_common.imaging.rejection import (
    MAX_PIXELS,
    Rejection,
    ScanRejected,
    ValuesTooLargeError,
    check_file,
    check_spacing,
    rejecting,
)

NIFTI = (".nii", ".nii.gz")
SYNTHETIC_NIFTI = "synthetic"
"""Start of the description of every NIfTI file written here."""
MILLIMETRES = {"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 0.001}
DESCRIPTION_BYTES = 79
MAX_EXTENSION_BYTES = 16 * 2**20
"""Header extensions, which are not used; some programs keep a protocol or a history in them."""
NIFTI2_BYTES = 544
READ_AT_ONCE = 2**20
THINNED_VOXELS = 2**19
SLAB_VOXELS = 2**22
"""Voxels that are read at once."""
NO_NIFTI = "not a NIfTI volume: damaged, or not what its name says"
GEOMETRY = (
    *("dim", "pixdim", "xyzt_units", "qform_code", "sform_code"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
"""Header fields that are copied; others may name the patient."""
logger.setLevel(logging.CRITICAL)  # nibabel reports each header repair; such headers are rejected here


def read_nifti(path: Path) -> Nifti1Image:
    """Open one grey volume without reading its voxels; `affine_mm` gives their positions.

    A compressed file is read to its end first: its checksum stands there. Whether a file is compressed is told by its
    content. One two-dimensional image is a volume of one slice.

    Raises:
        ScanRejected: the file cannot be used, for example because it is cut off or its orientation is not certain.
    """
    check_file(path)
    with rejecting(path, ImageFileError, HeaderDataError, HeaderTypeError):
        size = _whole_size(path)
        _check_extensions(path)
        with _opened(path) as stream:
            head = stream.read(NIFTI2_BYTES)
        if not is_nifti(head):
            what = foreign_kind(path)
            kind_of_refusal = Rejection.UNSUPPORTED if what else Rejection.UNREADABLE
            raise ScanRejected(path, kind_of_refusal, f"not a NIfTI volume, but {what}" if what else NO_NIFTI)
        kind: Any = Nifti2Image if Nifti2Header.may_contain_header(head) else Nifti1Image
        # an open stream: else each part of a compressed file unpacks it from its start
        volume = kind.from_file_map({"image": FileHolder(fileobj=cast("Any", _opened(path)))})
        _check_voxels(path, volume)
        _check_length(path, volume, size)
        _check_sizes(path, volume)
        _check_orientation(path, volume)
        return volume if volume.ndim > 2 else _one_slice(volume)


def _opened(path: Path) -> IO[bytes]:
    """A volume's bytes, unpacked where its content is compressed; some files have the other kind's name."""
    with path.open("rb") as stream:
        compressed = stream.read(2) == b"\x1f\x8b"
    return cast("IO[bytes]", gzip.open(path)) if compressed else path.open("rb")


def _whole_size(path: Path) -> int:
    """Bytes of a volume, unpacked; refuses a compressed file that ends early or whose checksum is wrong."""
    try:
        with _opened(path) as stream:
            if not isinstance(stream, gzip.GzipFile):
                return path.stat().st_size
            size = 0
            while chunk := stream.read(READ_AT_ONCE):
                size += len(chunk)
            return size
    except EOFError as error:
        raise ScanRejected(path, Rejection.UNREADABLE, "it is cut off: copy it again") from error
    except (OSError, zlib.error) as error:
        follows = isinstance(error, gzip.BadGzipFile) and "Not a gzipped file" in str(error)
        detail = "its checksum is wrong, so voxels changed on the way: copy it again"
        if follows:
            detail = "other bytes follow its end: compress it again"
        raise ScanRejected(path, Rejection.UNREADABLE, detail) from error


def _check_length(path: Path, volume: Nifti1Image, size: int) -> None:
    """Refuse a file of `size` bytes, unpacked, that ends before its last voxel: it may have been cut, then packed."""
    voxels: Any = volume.dataobj
    if voxels.offset + int(np.prod(volume.shape)) * volume.get_data_dtype().itemsize > size:
        raise ScanRejected(path, Rejection.UNREADABLE, "it is cut off: copy it again")


def _check_orientation(path: Path, volume: Nifti1Image) -> None:
    """Refuse a file that does not say how it lies, or says it in two ways: left and right may be swapped."""
    header = volume.header
    qform, sform = int(header["qform_code"]), int(header["sform_code"])
    if qform <= 0 and sform <= 0:
        detail = "it gives no orientation (its qform and sform codes are 0): write it with one, or from DICOM again"
        raise ScanRejected(path, Rejection.NO_ORIENTATION, detail)
    if qform > 0 and sform > 0:
        ways = ["".join(aff2axcodes(affine)) for affine in (header.get_qform(), header.get_sform())]
        if ways[0] != ways[1]:
            detail = f"qform and sform disagree ({ways[0]} and {ways[1]}): write the right one to both"
            raise ScanRejected(path, Rejection.NO_ORIENTATION, detail)


def _one_slice(volume: Nifti1Image) -> Nifti1Image:
    """A two-dimensional image as a volume of one slice."""
    header = volume.header.copy()
    header.set_data_shape((*volume.shape, 1))
    return type(volume)(np.asarray(volume.dataobj, np.float32)[..., None], volume.affine, header)


def affine_mm(volume: Nifti1Image) -> np.ndarray:
    """`(4,4)`: voxel -> millimetres to the right, to the front, up, converted from the file's unit."""
    affine = np.array(volume.affine, np.float64)
    affine[:3] *= MILLIMETRES[volume.header.get_xyzt_units()[0]]
    return affine


def read_voxels(volume: Nifti1Image) -> np.ndarray:
    """Real values, float32 `(I,J,K)`, the first axis fastest; they may hold values that are not finite."""
    voxels = np.empty(volume.shape[:3], np.float32, order="F")
    for slab in _slabs(voxels.shape):
        voxels[slab] = _part(volume, slab)
    return voxels


def read_slice(volume: Nifti1Image, affine: np.ndarray, axis: int, index: int) -> Nifti1Image:
    """The slice at `index` along `axis` as a volume of one slice, float32; `affine` places the volume in mm."""
    shape = [*volume.shape[:3]]
    shape[axis] = 1
    pixels = np.empty(shape, np.float32, order="F")
    chosen = slice(index, index + 1)
    if axis == 0:  # single voxels far from each other: reading all is faster
        for slab in _slabs(volume.shape[:3]):
            pixels[:, slab[1], slab[2]] = _part(volume, slab)[chosen]
    else:
        for slab in _slabs(shape):
            place = (slab[0], chosen, slab[2]) if axis == 1 else (slab[0], slab[1], chosen)
            pixels[slab] = _part(volume, place)
    affine = affine.copy()
    affine[:3, 3] += affine[:3, axis] * index
    return Nifti1Image(pixels, affine)


def read_thinned(volume: Nifti1Image, axis: int) -> np.ndarray:
    """Real values, float32 `(I,J,K)`: all slices along `axis`, thinned in the others to `THINNED_VOXELS`."""
    shape = volume.shape[:3]
    stride = max(1, math.ceil(math.sqrt(np.prod(shape, dtype=np.float64) / THINNED_VOXELS)))
    strides = [1 if place == axis else stride for place in range(3)]
    thinned = np.empty([-(-length // step) for length, step in zip(shape, strides, strict=True)], np.float32)
    for slab in _slabs(shape, THINNED_VOXELS):
        starts = [part.start or 0 for part in slab]
        first = [-start % step for start, step in zip(starts, strides, strict=True)]
        values = _part(volume, slab)[tuple(slice(at, None, step) for at, step in zip(first, strides, strict=True))]
        places = [(start + at) // step for start, at, step in zip(starts, first, strides, strict=True)]
        ends = [place + count for place, count in zip(places, values.shape, strict=True)]
        thinned[tuple(slice(*span) for span in zip(places, ends, strict=True))] = values
    return thinned


def _slabs(shape: Sequence[int], most: int = SLAB_VOXELS) -> Iterator[tuple[slice, slice, slice]]:
    """Parts of a volume that lie together in its file, of `most` voxels where an axis is not longer."""
    rows, columns, slices = shape
    whole = slice(None)
    if rows * columns <= most:
        step = most // (rows * columns)
        yield from ((whole, whole, slice(start, start + step)) for start in range(0, slices, step))
        return
    step = max(1, most // rows)
    for number in range(slices):
        for start in range(0, columns, step):
            yield whole, slice(start, start + step), slice(number, number + 1)


def _part(volume: Nifti1Image, place: tuple[slice, slice, slice]) -> np.ndarray:
    """Real values; scaling makes copies of them in double precision.

    Raises:
        ValuesTooLargeError: values beyond single precision.
    """
    values = np.asarray(volume.dataobj[(*place, *[0] * (len(volume.shape) - 3))])
    if values.dtype == np.float64 and values.size and np.nanmax(np.abs(values), initial=0) > np.finfo(np.float32).max:
        finite = values[np.isfinite(values)]
        if finite.size and np.abs(finite).max() > np.finfo(np.float32).max:
            raise ValuesTooLargeError
    return values


def write_nifti(path: Path, pixels: np.ndarray, frame: Frame | Scan) -> None:
    """Write real values `(H,W)` as a canonical one-slice volume at the position of the input's slice.

    Raises:
        ScanError: the input had no position in space, or the file cannot be written.
    """
    if frame.affine is None:
        raise ScanError(f"cannot write '{path}': the input has no position in space; write .png or .dcm instead")
    volume = nibabel.as_closest_canonical(Nifti1Image(pixels.astype(np.float32).T[..., None], frame.affine))
    volume.header.set_xyzt_units("mm")
    _save(path, volume, SYNTHETIC_NIFTI)


def write_nifti_like(
    path: Path, voxels: np.ndarray, affine: np.ndarray, source: Nifti1Header | None, description: str
) -> None:
    """Write real values `(I,J,K)` in the geometry of `source`: shape, affine, voxel sizes, unit and codes.

    Args:
        path: file to write.
        voxels: real values.
        affine: `(4,4)` in mm, used without a `source`.
        source: the header of the NIfTI file that the voxels came from, or None.
        description: cut to 79 characters, with the word synthetic in front.

    Raises:
        ScanError: the file cannot be written.
    """
    if source is None:
        volume = Nifti1Image(voxels.astype(np.float32), affine)
        volume.header.set_xyzt_units("mm")
    else:
        header: Nifti1Header = type(source)()
        for name in GEOMETRY:
            header[name] = source[name]
        header.set_data_dtype(np.float32)
        kind: Any = Nifti2Image if isinstance(source, Nifti2Header) else Nifti1Image
        volume = kind(voxels.astype(np.float32).reshape(source.get_data_shape()), source.get_best_affine(), header)
    _save(path, volume, f"{SYNTHETIC_NIFTI} {description}"[:DESCRIPTION_BYTES])


def _save(path: Path, volume: Nifti1Image, description: str) -> None:
    volume.header["descrip"] = description.encode("ascii", "replace")
    try:
        nibabel.save(volume, path)
    except OSError as error:
        raise ScanError(f"cannot write '{path}': {error.strerror or error}") from error


def _check_extensions(path: Path) -> None:
    """Refuse header extensions that are, or claim to be, larger than `MAX_EXTENSION_BYTES`: nibabel reads them."""
    with _opened(path) as stream:
        start = stream.read(NIFTI2_BYTES)
        header: Any = next((kind for kind in (Nifti2Header, Nifti1Header) if kind.may_contain_header(start)), None)
        if header is None:
            return  # nibabel says what it is not
        size = header.sizeof_hdr
        found = header(start[:size], check=False)
        offset = float(found["vox_offset"].item())
        if not 0 <= offset <= MAX_EXTENSION_BYTES:
            detail = f"its voxels begin at byte {offset:g}, at most {MAX_EXTENSION_BYTES} are skipped"
            raise ScanRejected(path, Rejection.TOO_LARGE, detail)
        extensions = (start + stream.read(max(0, int(offset) - len(start))))[size + 4 : int(offset)]
    order = found.endianness + "i"
    while len(extensions) >= 8:
        (length,) = struct.unpack_from(order, extensions)
        if not 8 <= length <= len(extensions):
            detail = f"a header extension of {length} bytes does not fit between header and voxels"
            raise ScanRejected(path, Rejection.UNREADABLE, detail)
        extensions = extensions[length:]


def _check_voxels(path: Path, volume: Nifti1Image) -> None:
    if volume.ndim < 2 or max(volume.shape[3:], default=1) > 1:
        raise ScanRejected(path, Rejection.UNSUPPORTED, f"its shape is {volume.shape}: one volume is expected")
    if np.prod(volume.shape, dtype=np.float64) > MAX_PIXELS:
        raise ScanRejected(
            path, Rejection.TOO_LARGE, f"its shape is {volume.shape}, at most {MAX_PIXELS} voxels are read"
        )
    if min(volume.shape) < 1 or volume.get_data_dtype().kind not in "iuf":
        raise ScanRejected(path, Rejection.UNSUPPORTED, f"voxels of type {volume.get_data_dtype()}: grey is expected")
    if bytes(volume.header["descrip"].item()).startswith(SYNTHETIC_NIFTI.encode()):
        raise ScanRejected(path, Rejection.SYNTHETIC, "its description says synthetic: only real scans are read")


def _check_sizes(path: Path, volume: Nifti1Image) -> None:
    with _opened(path) as stream:  # nibabel silently repairs sizes of 0 and below
        sizes = type(volume.header).from_fileobj(stream, check=False)["pixdim"][1 : 1 + min(3, volume.ndim)]
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        listed = ", ".join(f"{size:g}" for size in sizes)
        raise ScanRejected(path, Rejection.WRONG_GEOMETRY, f"its voxel sizes are {listed}: write the real ones")
    if not np.isfinite(volume.affine).all() or np.linalg.matrix_rank(volume.affine) < 4:
        raise ScanRejected(path, Rejection.WRONG_GEOMETRY, "its affine is singular: write a valid one")
    check_spacing(path, nibabel.affines.voxel_sizes(affine_mm(volume)))
