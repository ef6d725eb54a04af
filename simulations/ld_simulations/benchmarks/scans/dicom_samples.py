"""A DICOM file of each kind that comes out of a PACS."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pydicom.data
from PIL import Image, ImageDraw, ImageFont
from pydicom import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    EnhancedMRImageStorage,
    ImplicitVRLittleEndian,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    SecondaryCaptureImageStorage,
)

from ld_simulations.benchmarks.scans.pictures import SPACING_MM, STEP_MM, disc, mr_image, write_series
from ld_simulations.benchmarks.scans.samples import CHEST, LEVEL, PICTURE, FormatSample, Written

GROUP = "DICOM"
FILE = "image.dcm"
PIXELS = PICTURE.astype(np.uint16)
TRUTH = PICTURE.astype(np.float32)
NO_PLACE: dict[str, Any] = {"ImageOrientationPatient": None, "ImagePositionPatient": None}
RADIOGRAPH: dict[str, Any] = {
    **NO_PLACE,
    "PixelSpacing": None,
    "ImagerPixelSpacing": [6.0, 6.0],
    "ViewPosition": "PA",
    "BodyPartExamined": "CHEST",
    "PatientOrientation": ["L", "F"],
}
CR: dict[str, Any] = RADIOGRAPH | {"Modality": "CR", "SOPClassUID": ComputedRadiographyImageStorage}
DX: dict[str, Any] = RADIOGRAPH | {"Modality": "DX", "SOPClassUID": DigitalXRayImageStorageForPresentation}
RAW: dict[str, Any] = {"SOPClassUID": DigitalXRayImageStorageForProcessing, "PresentationIntentType": "FOR PROCESSING"}
CAPTURE: dict[str, Any] = {"SOPClassUID": SecondaryCaptureImageStorage, "ImageType": ["DERIVED", "SECONDARY"]}
PLANES = {"axial": [1, 0, 0, 0, 1, 0], "sagittal": [0, 1, 0, 0, 0, -1], "coronal": [1, 0, 0, 0, 0, -1]}
"""Plane -> directions of rows and columns in patient coordinates."""
ACROSS = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Plane -> the axis along which its slices lie."""
FRAMES: dict[str, Any] = {"SOPClassUID": MultiFrameGrayscaleWordSecondaryCaptureImageStorage, "NumberOfFrames": 2}
COLOUR: dict[str, Any] = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}


def dicom_samples() -> list[FormatSample]:
    """One sample for each kind."""

    def image(
        name: str, pixels: np.ndarray = PIXELS, truth: np.ndarray | None = TRUTH, **elements: Any
    ) -> FormatSample:
        write = functools.partial(_image, pixels, truth, elements)
        return FormatSample(GROUP, name, "", write, CHEST if elements.get("Modality") in ("CR", "DX") else "brain_mri")

    inverted = int(PIXELS.max()) - PIXELS
    mono: dict[str, Any] = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 8, "HighBit": 7}
    colour = np.repeat(PICTURE.astype(np.uint8)[..., None], 3, 2)
    return [
        FormatSample(GROUP, "MR series, a file for each slice", "", _series),
        FormatSample(GROUP, "Enhanced MR, all slices in one file", "", functools.partial(_enhanced, ["axial"])),
        FormatSample(GROUP, "Enhanced MR, three planes in one file", "", functools.partial(_enhanced, list(PLANES))),
        FormatSample(GROUP, "Without preamble and file meta information", "", _bare),
        image("MR that the scanner processed (DERIVED\\PRIMARY)", ImageType=["DERIVED", "PRIMARY"]),
        image("CR radiograph", **CR),
        image("DX radiograph, FOR PRESENTATION", **DX, PresentationIntentType="FOR PRESENTATION"),
        image("Radiograph with white as 0 (MONOCHROME1)", (255 - PIXELS).astype(np.uint16), **CR | mono),
        image("DX radiograph, FOR PROCESSING", inverted.astype(np.uint16), **DX | RAW),
        image("Lateral radiograph", **CR | {"ViewPosition": "LL"}),
        image("Radiograph of a hand in a chest study", **CR | {"BodyPartExamined": "HAND"}),
        image("CT in an MR study", Modality="CT", SOPClassUID=CTImageStorage),
        image("Localizer", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        image("Secondary capture", **CAPTURE),
        image("MR that somebody derived (DERIVED\\SECONDARY)", ImageType=["DERIVED", "SECONDARY"]),
        image("With BurnedInAnnotation YES", BurnedInAnnotation="YES"),
        image("With a name in the picture", _labelled(), None),
        image("Frames without a place each", np.stack([PIXELS] * 2), None, **FRAMES, Rows=64, Columns=64),
        image("Mosaic (Siemens functional MR)", ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]),
        image("Colour", colour, None, **COLOUR, BitsAllocated=8, BitsStored=8, HighBit=7),
        image("Pixels of 32 bits", PICTURE.astype(np.uint32), None),
        image("Synthetic image of this project", SyntheticData="YES"),
        FormatSample(GROUP, "Object without pixels, such as a report", "", _report),
        FormatSample(GROUP, "DICOMDIR of a disc", "", _dicomdir),
    ]


def _image(pixels: np.ndarray, truth: np.ndarray | None, elements: dict[str, Any], folder: Path) -> Written:
    mr_image(pixels, **elements).save_as(folder / FILE, enforce_file_format=True)
    return Written(FILE, truth)


def _labelled() -> np.ndarray:
    picture = Image.fromarray(disc(LEVEL, 256).astype(np.uint8))
    ImageDraw.Draw(picture).text((90, 118), "WEBER ANNA", fill=255, font=ImageFont.load_default(14))
    return np.asarray(picture).astype(np.uint16)


def _series(folder: Path) -> Written:
    write_series(folder, PICTURE)
    return Written("", TRUTH)


def _enhanced(planes: list[str], folder: Path) -> Written:
    """A stack of each plane in one file; those that are not axial show noise."""
    frames, pixels, slices = [], [], 5
    noise = np.random.default_rng(0).integers(0, PIXELS.max(), PIXELS.shape).astype(PIXELS.dtype)
    for plane in planes:
        for number in range(slices):
            position, orientation, frame = Dataset(), Dataset(), Dataset()
            place = [0.0, 0.0, 0.0]
            place[ACROSS[plane]] = (number - slices // 2) * STEP_MM
            position.ImagePositionPatient, orientation.ImageOrientationPatient = place, PLANES[plane]
            frame.PlanePositionSequence = DicomSequence([position])
            frame.PlaneOrientationSequence = DicomSequence([orientation])
            frames.append(frame)
            pixels.append(PIXELS if plane == "axial" else noise)
    shared, measures = Dataset(), Dataset()
    measures.PixelSpacing = [SPACING_MM, SPACING_MM]
    shared.PixelMeasuresSequence = DicomSequence([measures])
    elements: dict[str, Any] = {
        **NO_PLACE,
        "PixelSpacing": None,
        "SOPClassUID": EnhancedMRImageStorage,
        "NumberOfFrames": len(frames),
    }
    dataset = mr_image(np.stack(pixels), **elements, Rows=PIXELS.shape[0], Columns=PIXELS.shape[1])
    dataset.SharedFunctionalGroupsSequence = DicomSequence([shared])
    dataset.PerFrameFunctionalGroupsSequence = DicomSequence(frames)
    dataset.save_as(folder / FILE, enforce_file_format=True)
    return Written(FILE, TRUTH)


def _bare(folder: Path) -> Written:
    dataset = mr_image(PIXELS)
    del dataset.file_meta
    dataset.save_as(folder / FILE, implicit_vr=ImplicitVRLittleEndian.is_implicit_VR, little_endian=True)
    return Written(FILE, TRUTH)


def _report(folder: Path) -> Written:
    elements: dict[str, Any] = dict.fromkeys(("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelData"))
    mr_image(PIXELS, **elements, Modality="SR").save_as(folder / FILE, enforce_file_format=True)
    return Written(FILE)


def _dicomdir(folder: Path) -> Written:
    """That of pydicom's test files."""
    source = Path(pydicom.data.__file__).parent / "test_files/dicomdirtests/DICOMDIR"
    (folder / "DICOMDIR").write_bytes(source.read_bytes())
    return Written("DICOMDIR")
