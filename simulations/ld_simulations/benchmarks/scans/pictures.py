"""Small pictures of one known grey level, written in the formats that scans come in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Image
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

SIDE, SPACING_MM, STEP_MM, SLICES = 64, 3.4, 5.0, 9
EMPTY_PREAMBLE = bytes(128)


def disc(level: float, side: int = SIDE) -> np.ndarray:
    """A disc of one level on black, with a darker middle, float64 `(side,side)`."""
    down, right = np.mgrid[:side, :side] / (side - 1) * 2 - 1
    radius = np.hypot(down, right)
    return np.where(radius < 0.25, 0.6, radius < 0.85) * float(level)


def level_of(pixels: np.ndarray) -> float:
    """The level of the disc that a picture shows."""
    return float(np.percentile(pixels, 90))


def write_nifti(path: Path, picture: np.ndarray, slices: int = SLICES) -> None:
    """Write a volume whose axial slices all show the picture `(rows,columns)`, int16."""
    voxels = np.repeat(picture.T[..., None], slices, 2).astype(np.int16)
    affine = np.diag([-SPACING_MM, -SPACING_MM, STEP_MM, 1])  # columns run to the left, rows to the back
    nibabel.save(Nifti1Image(voxels, affine), path)


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write 8-bit grey in the format of the path's ending."""
    Image.fromarray(np.round(picture).astype(np.uint8)).save(path, quality=95)


def mr_image(pixels: np.ndarray, height_mm: float = 0.0, **elements: Any) -> Dataset:
    """An axial MR image of uint16 or uint8 pixels `(H,W)` of nobody; an element given as None is left out."""
    bits = 8 * pixels.dtype.itemsize
    header: dict[str, Any] = {
        "SOPClassUID": MRImageStorage,
        "SOPInstanceUID": generate_uid(),
        "SeriesInstanceUID": generate_uid(),
        "StudyInstanceUID": generate_uid(),
        "Modality": "MR",
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "SeriesNumber": 1,
        "PixelSpacing": [SPACING_MM, SPACING_MM],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [0, 0, height_mm],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": 0,
        "PixelData": pixels.tobytes(),
    }
    return dataset_of(header | elements)


def dataset_of(elements: Mapping[str, Any]) -> Dataset:
    """A data set of elements by keyword, to be written explicit little-endian; one given as None is left out."""
    dataset = Dataset()
    for keyword, value in elements.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def write_series(folder: Path, picture: np.ndarray, slices: int = SLICES, **elements: Any) -> list[Path]:
    """Write an axial series whose slices all show the picture; returns its files."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid(), **elements}
    files = []
    for number in range(slices):
        height = (number - (slices - 1) / 2) * STEP_MM
        path = folder / f"{number}.dcm"
        mr_image(picture.astype(np.uint16), height, **shared).save_as(path, enforce_file_format=True)
        files.append(path)
    return files
