"""A visit's slices as DICOM MR Image Storage files, with the identity that a hospital's own files carry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import MRImageStorage

from ld_common.core.seeding import numpy_generator
from ld_simulations.phantoms.brain_anatomy import CENTRE_Y_MM
from ld_simulations.phantoms.device import Array
from ld_simulations.phantoms.scanner import ScannerConfig
from ld_simulations.phantoms.study_metadata import StudyMetadata, new_image

SLICE_THICKNESS_MM = 4.0
ORIGIN_NOTE = "Simulated patient: MNI152 anatomy, Latent Drift Federation demo"


def write_series(folder: Path, metadata: StudyMetadata, slices: Mapping[float, Array], config: ScannerConfig) -> None:
    """Write slices of device values (H,W), keyed by their height in mm, into `folder`.

    Neither file names nor instance numbers follow the slices' positions, as at many a real site.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = numpy_generator(metadata.seed, "file-order", metadata.uid())
    names, numbers = _out_of_order(len(slices), rng), _out_of_order(len(slices), rng)
    for (z_mm, values), name, number in zip(slices.items(), names, numbers, strict=True):
        dataset = new_image(metadata, MRImageStorage, f"{z_mm:.3f}", values, config)
        dataset.InstanceNumber = number
        _describe_place(dataset, z_mm, config)
        _describe_series(dataset, metadata)
        dataset.save_as(folder / f"IM{name:04d}.dcm", enforce_file_format=True)


def _out_of_order(count: int, rng: np.random.Generator) -> list[int]:
    """The numbers from 1 in an order that is neither rising nor falling, and whose middle one is not in the middle."""
    if count < 3:
        return list(range(count, 0, -1))
    while True:
        order = [int(number) for number in rng.permutation(count) + 1]
        if order[count // 2] != count // 2 + 1:
            return order


def _describe_place(dataset: Dataset, z_mm: float, config: ScannerConfig) -> None:
    # DICOM's axes run to the patient's left and back, the template's to the right and front
    left = -(config.columns - 1) / 2 * config.spacing_mm
    back = -CENTRE_Y_MM - (config.rows - 1) / 2 * config.spacing_mm
    dataset.ImagePositionPatient = [round(left, 4), round(back, 4), round(z_mm, 4)]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.SliceLocation = round(z_mm, 4)
    dataset.PixelSpacing = [config.spacing_mm, config.spacing_mm]
    dataset.SliceThickness = SLICE_THICKNESS_MM


def _describe_series(dataset: Dataset, metadata: StudyMetadata) -> None:
    """How the series was made."""
    dataset.Modality = "MR"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
    dataset.ImageComments = ORIGIN_NOTE
    dataset.FrameOfReferenceUID = metadata.uid("frame")
    dataset.PositionReferenceIndicator = ""
    dataset.SeriesNumber, dataset.AcquisitionNumber = 1, 1
    dataset.SeriesDescription, dataset.BodyPartExamined = "T1 axial, brain extracted", "BRAIN"
    dataset.PatientPosition = "HFS"
    dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = "GR", "SP", ""
    dataset.MRAcquisitionType = "2D"
    dataset.RepetitionTime, dataset.EchoTime, dataset.EchoTrainLength = 250.0, 4.6, 1
    dataset.FlipAngle, dataset.MagneticFieldStrength = 70.0, 1.5
