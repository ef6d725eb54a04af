"""Trees of many small DICOM files, written fast, with the table and the config of a site that reads them."""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom.data
import yaml
from pydicom import Dataset, dcmread
from pydicom.filewriter import dcmwrite
from pydicom.uid import UID

SIDE = 64
"""Rows and columns of each image."""
SPACING_MM, STEP_MM = 3.4, 3.75
"""The field of view is 218 mm; 40 slices cover 150 mm, as much as a head."""
FIRST_DATE = datetime.date(2015, 3, 2)
DAYS_BETWEEN = 400
UID_ROOT = "1.2.826.0.1.3680043.8.498"
PLACES = {
    "patient": "PATIENT0",
    "date": "19000101",
    "study": f"{UID_ROOT}.1{0:019}",
    "series": f"{UID_ROOT}.2{0:019}",
    "image": f"{UID_ROOT}.3{0:019}",
    "number": "7777",
    "height": "-9999.999",
}
"""What the template holds in place of each image's own values, which are as long."""
HEAD = ("patient", "date", "age", "sex", "diagnosis")


@dataclass(frozen=True)
class TreeSize:
    """How many files a tree has: a series of `slices` files for each visit."""

    patients: int
    visits: int = 2
    """Of each patient."""
    slices: int = 40

    @property
    def files(self) -> int:
        """Number of DICOM files."""
        return self.patients * self.visits * self.slices


@dataclass(frozen=True)
class TreeVisit:
    """One visit of a tree and its row of the table."""

    patient: int
    visit: int

    @property
    def name(self) -> str:
        """The patient in headers and table, and the folder of the files."""
        return f"PAT{self.patient:05}"

    @property
    def date(self) -> datetime.date:
        """Of the visit, `DAYS_BETWEEN` after the one before."""
        return FIRST_DATE + datetime.timedelta(days=self.visit * DAYS_BETWEEN)

    @property
    def sex(self) -> str:
        """F or M."""
        return "FM"[self.patient % 2]

    def row(self) -> tuple[object, ...]:
        """Cells of `HEAD`."""
        age = 50 + self.patient % 30 + round(self.visit * DAYS_BETWEEN / 365.25, 1)
        return self.name, self.date, age, self.sex, ("CN", "AD")[self.patient // 2 % 2]


def visits_of(size: TreeSize) -> Iterator[TreeVisit]:
    """Every visit, patient by patient."""
    return (TreeVisit(patient, visit) for patient in range(size.patients) for visit in range(size.visits))


def write_tree(folder: Path, size: TreeSize, project: Path, base_model: Path, seed: int = 0) -> Path:
    """Write `scans/`, `visits.csv` and `site.yaml` of one site into `folder`; returns the YAML file.

    Args:
        folder: of the site; its `scans` must not exist.
        size: of the tree.
        project: the repository, whose modality `brain_mri` is used.
        base_model: folder of the base model.
        seed: of the pixels.
    """
    images, visits = ImageWriter(seed), list(visits_of(size))
    for visit in visits:
        images.write_series(folder / "scans", visit, size.slices)
    write_visits(folder, visits)
    site = {
        "site": "scans",
        "modality": str(project.resolve() / "configs/modalities/brain_mri.yaml"),
        "base_model": str(base_model.resolve()),
        "store": "store",
        "data": {
            "root": "scans",
            "table": "visits.csv",
            "columns": {"attributes": {name: name for name in ("age", "sex", "diagnosis")}},
        },
        "policy": {"min_patients": 1},
    }
    site_yaml = folder / "site.yaml"
    site_yaml.write_text(yaml.safe_dump(site, sort_keys=False), encoding="utf-8")
    return site_yaml


def write_visits(folder: Path, visits: list[TreeVisit]) -> None:
    """Write the table of these visits."""
    with (folder / "visits.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([HEAD, *(visit.row() for visit in visits)])


class ImageWriter:
    """Writes series of small heads: one template by pydicom for each sex, in which only values are replaced."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._templates = {sex: _template(sex) for sex in "FM"}
        down, right = np.mgrid[:SIDE, :SIDE] / (SIDE - 1) * 2 - 1
        self._radius = np.hypot(down / 0.85, right / 0.7)

    def write_series(self, scans: Path, visit: TreeVisit, slices: int) -> None:
        """Write the files of one visit; every image has pixels of its own."""
        folder = scans / visit.name / visit.date.isoformat()
        folder.mkdir(parents=True)
        template = self._templates[visit.sex]
        series = visit.patient * 1000 + visit.visit
        own = {
            "patient": visit.name,
            "date": f"{visit.date:%Y%m%d}",
            "study": f"{UID_ROOT}.1{series:019}",
            "series": f"{UID_ROOT}.2{series:019}",
        }
        for number in range(slices):
            height = (number - (slices - 1) / 2) * STEP_MM
            own["image"] = f"{UID_ROOT}.3{series * 1000 + number:019}"
            own["number"] = f"{number + 1:4}"
            own["height"] = f"{height:9.3f}"
            content = template
            for place, value in own.items():
                content = content.replace(PLACES[place].encode(), value.encode())
            (folder / f"{number:03}.dcm").write_bytes(content + self._pixels(height).tobytes())

    def _pixels(self, height: float) -> np.ndarray:
        """A head at a height in mm, with dark ventricles and noise, int16 `(SIDE,SIDE)`."""
        size = np.sqrt(max(0.05, 1 - (height / 90) ** 2))
        wide = 0.2 + 0.1 * self._rng.random()
        picture = np.where(self._radius < size, 400.0, 0.0)
        picture[(self._radius < wide) & (size > 0.8)] = 150
        return np.abs(picture + self._rng.normal(0, 20, picture.shape)).astype("<i2")


def _template(sex: str) -> bytes:
    """A real header (pydicom's `MR_small.dcm`) with the marks of `PLACES`, up to the values of the pixels."""
    dataset = dcmread(Path(pydicom.data.__file__).parent / "test_files/MR_small.dcm")
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "M", "SE"]
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = UID(PLACES["image"])
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = PLACES["study"], PLACES["series"]
    dataset.FrameOfReferenceUID = PLACES["study"]
    dataset.PatientID, dataset.PatientName, dataset.PatientSex = PLACES["patient"], f"{PLACES['patient']}^X", sex
    dataset.StudyDate = dataset.InstanceCreationDate = PLACES["date"]
    dataset.SeriesDescription = "ax T1 se"
    dataset.InstanceNumber = PLACES["number"]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    corner = -SPACING_MM * (SIDE - 1) / 2
    dataset.ImagePositionPatient = [corner, corner, PLACES["height"]]
    dataset.SliceThickness = STEP_MM
    dataset.PixelSpacing = [SPACING_MM, SPACING_MM]
    return _without_pixels(dataset)


def _without_pixels(dataset: Dataset) -> bytes:
    """The file up to the values of its pixels, which come last."""
    del dataset[0xFFFCFFFC]
    dataset.PixelData = bytes(2 * SIDE * SIDE)
    stream = io.BytesIO()
    dcmwrite(stream, dataset, enforce_file_format=True)
    content = stream.getvalue()
    if not content.endswith(dataset.PixelData):
        raise ValueError("the template's pixels are not its last element")
    return content[: -len(dataset.PixelData)]
