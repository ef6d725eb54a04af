"""A visit's frontal radiograph as a DICOM CR or DX file, with the identity that a hospital's own files carry."""

from __future__ import annotations

from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.uid import ComputedRadiographyImageStorage, DigitalXRayImageStorageForPresentation

from ld_simulations.phantoms.detector import DetectorConfig
from ld_simulations.phantoms.device import Array
from ld_simulations.phantoms.study_metadata import StudyMetadata, new_image

ORIGIN_NOTE = "Simulated patient: chest drawn from equations, Latent Drift Federation demo"
CHEST = ("51185008", "SCT", "Chest")
POSTERO_ANTERIOR = ("399348003", "SCT", "postero-anterior")


def write_radiograph(folder: Path, metadata: StudyMetadata, values: Array, config: DetectorConfig) -> None:
    """Write device values (H,W) of a postero-anterior chest radiograph into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    sop_class = DigitalXRayImageStorageForPresentation if config.digital else ComputedRadiographyImageStorage
    dataset = new_image(metadata, sop_class, "PA", values, config)
    _describe_projection(dataset, config)
    if config.digital:
        _describe_digital(dataset, config)
    dataset.save_as(folder / "IM0001.dcm", enforce_file_format=True)


def _describe_projection(dataset: Dataset, config: DetectorConfig) -> None:
    """What CR and DX images have in common."""
    dataset.Modality = "DX" if config.digital else "CR"
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.ImageComments = ORIGIN_NOTE
    dataset.SeriesNumber, dataset.AcquisitionNumber, dataset.InstanceNumber = 1, 1, 1
    dataset.SeriesDescription, dataset.BodyPartExamined = "Chest PA", "CHEST"
    dataset.ViewPosition = "PA"
    dataset.PatientOrientation = ["L", "F"]
    dataset.ImagerPixelSpacing = [config.spacing_mm, config.spacing_mm]
    dataset.PixelIntensityRelationship = "LOG"
    # -1: a higher number is less radiation; under MONOCHROME1 the numbers run the other way
    dataset.PixelIntensityRelationshipSign = 1 if config.monochrome1 else -1
    dataset.KVP = 120
    if not config.digital:
        # type 2 elements of the CR series and of its plate: written, though they say nothing
        dataset.PlateType, dataset.Laterality = "", ""


def _describe_digital(dataset: Dataset, config: DetectorConfig) -> None:
    """The modules that a DX image for presentation has and a CR image has not."""
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.PresentationLUTShape = "INVERSE" if config.monochrome1 else "IDENTITY"
    dataset.ImageLaterality = "U"
    dataset.AcquisitionContextSequence = []
    dataset.AnatomicRegionSequence = [_code(*CHEST)]
    view = _code(*POSTERO_ANTERIOR)
    view.ViewModifierCodeSequence = []
    dataset.ViewCodeSequence = [view]
    dataset.DetectorType, dataset.DetectorConfiguration = "DIRECT", "AREA"
    dataset.DetectorID = ""
    dataset.PositionerType = ""
    dataset.FieldOfViewShape = "RECTANGLE"
    size = [round(config.rows * config.spacing_mm), round(config.columns * config.spacing_mm)]
    dataset.FieldOfViewDimensions = size
    low, high = config.stored_range
    dataset.WindowCenter, dataset.WindowWidth = (low + high + 1) / 2, high - low + 1


def _code(value: str, adapter: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, adapter, meaning
    return item
