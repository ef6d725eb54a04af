"""A visit in a hospital's records, and the header that its DICOM files share."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from ld_simulations.phantoms.device import Array, DeviceConfig, stored_values


@dataclass(frozen=True)
class StudyMetadata:
    """Records of one visit, as the device writes them into every file."""

    identity: str
    name: str
    """In DICOM's form, family^given."""
    born: date
    sex: str
    age_years: float
    day: date
    hospital: str
    seed: int
    """UIDs are derived from it, the hospital, the patient and the day."""

    def uid(self, *parts: str | int) -> str:
        """A UID that depends on the metadata and the parts only."""
        parts_of_uid = (self.seed, self.hospital, self.identity, self.day, *parts)
        return str(generate_uid(entropy_srcs=["/".join(map(str, parts_of_uid))]))


def new_image(metadata: StudyMetadata, sop_class: str, name: str, values: Array, config: DeviceConfig) -> Dataset:
    """A DICOM data set of device values (H,W); `name` distinguishes the images of a visit."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(sop_class)
    meta.MediaStorageSOPInstanceUID = UID(metadata.uid("image", name))
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    _describe_patient(dataset, metadata)
    _describe_pixels(dataset, values, config)
    dataset.Manufacturer = config.manufacturer
    dataset.SeriesInstanceUID = metadata.uid("series")
    dataset.BurnedInAnnotation = "NO"
    dataset.LossyImageCompression = "00"
    return dataset


def _describe_pixels(dataset: Dataset, values: Array, config: DeviceConfig) -> None:
    dataset.Rows, dataset.Columns = config.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if config.monochrome1 else "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored = config.bits_allocated, config.bits_stored
    dataset.HighBit = config.bits_stored - 1
    dataset.PixelRepresentation = int(config.signed)
    dataset.RescaleSlope, dataset.RescaleIntercept = config.rescale_slope, config.rescale_intercept
    dataset.RescaleType = "US"
    dataset.add_new("PixelData", "OB" if config.bits_allocated == 8 else "OW", stored_values(values, config).tobytes())


def _describe_patient(dataset: Dataset, metadata: StudyMetadata) -> None:
    """Identifying elements, which must not leave a site."""
    dataset.PatientName, dataset.PatientID = metadata.name, metadata.identity
    dataset.PatientBirthDate = f"{metadata.born:%Y%m%d}"
    dataset.PatientSex = metadata.sex
    dataset.PatientAge = f"{int(metadata.age_years):03d}Y"
    dataset.InstitutionName = f"{metadata.hospital.title()} Hospital"
    dataset.ReferringPhysicianName = "Referrer^Robin"
    dataset.AccessionNumber = metadata.uid("accession")[-8:]
    dataset.StudyID = metadata.uid("study")[-6:]
    dataset.StudyInstanceUID = metadata.uid("study")
    day = f"{metadata.day:%Y%m%d}"
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = dataset.ContentDate = day
    dataset.StudyTime = dataset.SeriesTime = dataset.AcquisitionTime = dataset.ContentTime = "101500"
