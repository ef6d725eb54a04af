"""A visit's slices as DICOM MR Image Storage files, with the identity that a hospital's own files carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from ld_common.seeding import numpy_generator
from ld_simulations.anatomy import CENTRE_Y_MM, Array
from ld_simulations.scanner import ScannerConfig, stored_values

SLICE_THICKNESS_MM = 4.0
ORIGIN_NOTE = "Simulated patient: MNI152 anatomy, Latent Drift Federation demo"


@dataclass(frozen=True)
class Examination:
    """What a hospital's records say of one visit, as its scanner writes it into every file."""

    identity: str
    name: str
    """In DICOM's form, family^given."""
    born: date
    sex: str
    age_years: float
    day: date
    hospital: str
    seed: int
    """UIDs derive from it, the hospital, the patient and the day."""

    def uid(self, *parts: str | int) -> str:
        """A UID that is the same for the same examination and parts."""
        whose = (self.seed, self.hospital, self.identity, self.day, *parts)
        return str(generate_uid(entropy_srcs=["/".join(map(str, whose))]))


def write_series(folder: Path, examination: Examination, slices: Mapping[float, Array], config: ScannerConfig) -> None:
    """Write slices of scanner values (H,W), keyed by their height in mm, into `folder`.

    Neither file names nor instance numbers follow the slices' positions, as at many a real site.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = numpy_generator(examination.seed, "file-order", examination.uid())
    names, numbers = _out_of_order(len(slices), rng), _out_of_order(len(slices), rng)
    for (z_mm, values), name, number in zip(slices.items(), names, numbers, strict=True):
        dataset = _image(examination, values, z_mm, config)
        dataset.InstanceNumber = number
        _describe_patient(dataset, examination)
        _describe_series(dataset, examination, config)
        dataset.save_as(folder / f"IM{name:04d}.dcm", enforce_file_format=True)


def _out_of_order(count: int, rng: np.random.Generator) -> list[int]:
    """The numbers from 1 in an order that is neither rising nor falling, and whose middle one is not in the middle."""
    if count < 3:
        return list(range(count, 0, -1))
    while True:
        order = [int(number) for number in rng.permutation(count) + 1]
        if order[count // 2] != count // 2 + 1:
            return order


def _image(examination: Examination, values: Array, z_mm: float, config: ScannerConfig) -> Dataset:
    """A data set with its file's header, the pixels and where they lie."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = UID(examination.uid("image", f"{z_mm:.3f}"))
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    # DICOM's axes run to the patient's left and back, the template's to the right and front
    left = -(config.columns - 1) / 2 * config.spacing_mm
    back = -CENTRE_Y_MM - (config.rows - 1) / 2 * config.spacing_mm
    dataset.ImagePositionPatient = [round(left, 4), round(back, 4), round(z_mm, 4)]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.SliceLocation = round(z_mm, 4)
    dataset.PixelSpacing = [config.spacing_mm, config.spacing_mm]
    dataset.SliceThickness = SLICE_THICKNESS_MM
    dataset.Rows, dataset.Columns = config.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if config.monochrome1 else "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored = config.bits_allocated, config.bits_stored
    dataset.HighBit = config.bits_stored - 1
    dataset.PixelRepresentation = int(config.signed)
    dataset.RescaleSlope, dataset.RescaleIntercept = config.rescale_slope, config.rescale_intercept
    dataset.RescaleType = "US"
    dataset.add_new("PixelData", "OB" if config.bits_allocated == 8 else "OW", stored_values(values, config).tobytes())
    return dataset


def _describe_patient(dataset: Dataset, examination: Examination) -> None:
    """Who was examined, when and where: what a site must not let out."""
    dataset.PatientName, dataset.PatientID = examination.name, examination.identity
    dataset.PatientBirthDate = f"{examination.born:%Y%m%d}"
    dataset.PatientSex = examination.sex
    dataset.PatientAge = f"{int(examination.age_years):03d}Y"
    dataset.InstitutionName = f"{examination.hospital.title()} Hospital"
    dataset.ReferringPhysicianName = "Referrer^Robin"
    dataset.AccessionNumber = examination.uid("accession")[-8:]
    dataset.StudyID = examination.uid("study")[-6:]
    dataset.StudyInstanceUID = examination.uid("study")
    day = f"{examination.day:%Y%m%d}"
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = dataset.ContentDate = day
    dataset.StudyTime = dataset.SeriesTime = dataset.AcquisitionTime = dataset.ContentTime = "101500"


def _describe_series(dataset: Dataset, examination: Examination, config: ScannerConfig) -> None:
    """How the series was made."""
    dataset.Modality = "MR"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
    dataset.Manufacturer = config.manufacturer
    dataset.ImageComments = ORIGIN_NOTE
    dataset.BurnedInAnnotation = "NO"
    dataset.LossyImageCompression = "00"
    dataset.SeriesInstanceUID = examination.uid("series")
    dataset.FrameOfReferenceUID = examination.uid("frame")
    dataset.PositionReferenceIndicator = ""
    dataset.SeriesNumber, dataset.AcquisitionNumber = 1, 1
    dataset.SeriesDescription, dataset.BodyPartExamined = "T1 axial, brain extracted", "BRAIN"
    dataset.PatientPosition = "HFS"
    dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = "GR", "SP", ""
    dataset.MRAcquisitionType = "2D"
    dataset.RepetitionTime, dataset.EchoTime, dataset.EchoTrainLength = 250.0, 4.6, 1
    dataset.FlipAngle, dataset.MagneticFieldStrength = 70.0, 1.5
