"""A file of each format other than DICOM that scans are handed over in."""

from __future__ import annotations

import functools
import gzip
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
from nibabel.freesurfer.mghformat import MGHImage
from nibabel.nifti1 import Nifti1Image, Nifti1Pair
from nibabel.nifti2 import Nifti2Image
from PIL import Image

from ld_simulations.benchmarks.scans.pictures import SLICES, SPACING_MM, STEP_MM, mr_image, write_nifti, write_picture
from ld_simulations.benchmarks.scans.samples import CHEST, PICTURE, FormatSample, Written

GROUP = "other formats"
TRUTH = PICTURE.astype(np.float32)
VOXELS = np.repeat(PICTURE.T[..., None], SLICES, 2).astype(np.float32)
AFFINE = np.diag([-SPACING_MM, -SPACING_MM, STEP_MM, 1.0])
EIGHT_BITS = PICTURE.astype(np.uint8)
SIXTEEN_BITS = (200 * PICTURE).astype(np.uint16)


def image_samples() -> list[FormatSample]:
    """One sample for each format."""

    def sample(
        name: str, ending: str, write: Callable[[Path], object], truth: np.ndarray | None = None
    ) -> FormatSample:
        picture = ending in (".png", ".jpg")
        wanted = TRUTH if truth is None else truth
        return FormatSample(
            GROUP,
            name,
            ending,
            functools.partial(_written, f"scan{ending}", write, wanted),
            CHEST if picture else "brain_mri",
        )

    text = b"# === DATA DESCRIPTION FILE ======\n"
    header = b"ObjectType = Image\nNDims = 3\nElementDataFile = LOCAL\n"
    return [
        sample("NIfTI-1", ".nii", lambda path: write_nifti(path, PICTURE)),
        sample("NIfTI-1, compressed", ".nii.gz", lambda path: write_nifti(path, PICTURE)),
        sample("NIfTI-2", ".nii", lambda path: nibabel.save(Nifti2Image(VOXELS, AFFINE), path)),
        sample("NIfTI of one slice", ".nii", lambda path: nibabel.save(Nifti1Image(VOXELS[:, :, 0], AFFINE), path)),
        sample("PNG, grey, 8 bit", ".png", lambda path: write_picture(path, PICTURE)),
        sample("PNG, grey, 16 bit", ".png", Image.fromarray(SIXTEEN_BITS).save, SIXTEEN_BITS.astype(np.float32)),
        sample("PNG, grey written as colour", ".png", Image.fromarray(_coloured(1, 1)).save),
        sample("JPEG, grey", ".jpg", lambda path: write_picture(path, PICTURE)),
        sample("PNG, colour", ".png", Image.fromarray(_coloured(0, 1)).save),
        sample("PNG with a palette", ".png", Image.fromarray(EIGHT_BITS).convert("P").save),
        sample("NIfTI of several volumes (4-D)", ".nii", _several_volumes),
        sample("NIfTI without orientation", ".nii", _without_orientation),
        sample("NIfTI cut off", ".nii.gz", _cut_off),
        sample("NIfTI or Analyze, header", ".hdr", lambda path: nibabel.save(Nifti1Pair(VOXELS, AFFINE), path)),
        sample("NIfTI or Analyze, voxels", ".img", lambda path: path.write_bytes(VOXELS.tobytes())),
        sample("FreeSurfer", ".mgz", lambda path: nibabel.save(MGHImage(VOXELS, AFFINE), path)),
        sample("NRRD", ".nrrd", lambda path: path.write_bytes(b"NRRD0004\ntype: float\n\n" + VOXELS.tobytes())),
        sample("MetaImage", ".mha", lambda path: path.write_bytes(header + VOXELS.tobytes())),
        sample("MetaImage, header", ".mhd", lambda path: path.write_bytes(header)),
        sample("MINC", ".mnc", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))),
        sample("Philips PAR/REC", ".par", lambda path: path.write_bytes(text)),
        sample("TIFF", ".tif", Image.fromarray(EIGHT_BITS).save),
        sample("BMP", ".bmp", Image.fromarray(EIGHT_BITS).save),
        sample("GIF", ".gif", Image.fromarray(EIGHT_BITS).save),
        sample("JPEG 2000, bare", ".jp2", Image.fromarray(EIGHT_BITS).save),
        sample("PDF", ".pdf", Image.fromarray(EIGHT_BITS).save),
        sample("Zip archive", ".zip", _zipped),
        sample("DICOM, compressed by gzip", ".dcm.gz", _zipped_dicom),
        sample("Empty file", ".dcm", lambda path: path.write_bytes(b"")),
    ]


def _written(file: str, write: Callable[[Path], object], truth: np.ndarray, folder: Path) -> Written:
    write(folder / file)
    return Written(file, truth)


def _coloured(green: float, blue: float) -> np.ndarray:
    return (PICTURE[..., None] * np.array([1, green, blue])).astype(np.uint8)


def _several_volumes(path: Path) -> None:
    nibabel.save(Nifti1Image(np.stack([VOXELS] * 2, -1), AFFINE), path)


def _without_orientation(path: Path) -> None:
    volume = Nifti1Image(VOXELS, AFFINE)
    volume.set_qform(AFFINE, 0)
    volume.set_sform(AFFINE, 0)
    nibabel.save(volume, path)


def _cut_off(path: Path) -> None:
    write_nifti(path, PICTURE)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 9 // 10])


def _zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "scans")


def _zipped_dicom(path: Path) -> None:
    plain = path.with_suffix("")
    mr_image(PICTURE.astype(np.uint16)).save_as(plain, enforce_file_format=True)
    path.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
