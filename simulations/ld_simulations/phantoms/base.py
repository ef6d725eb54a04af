"""The interface of a phantom, from which hospitals, true counterfactuals and the growth ceiling are made.

A `Phantom` is a causal model with an imaging device. It draws a patient's exogenous noise, renders the patient under
any attributes, acquires the image and writes it to files. Disease and age change the size of one structure in it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from ld_common.core.config import require
from ld_common.core.errors import RequestError
from ld_common.imaging.modality import Attributes
from ld_simulations.phantoms.device import Array, DeviceConfig
from ld_simulations.phantoms.study_metadata import StudyMetadata

HEALTHY = "CN"
SEX_EDIT = "other_sex"
AGE_EDITS_YEARS = (10.0, 20.0)


class Noise(Protocol):
    """One patient's exogenous noise, kept under every intervention."""

    @property
    def scanner_seed(self) -> int:
        """Seed of the device's noise; visits and views derive theirs from it."""


N = TypeVar("N", bound=Noise)
D = TypeVar("D", bound=DeviceConfig)


@dataclass(frozen=True, eq=False)
class Patient(Generic[N]):
    """A patient at the first visit, before any intervention."""

    identity: str
    sex: str
    diagnosis: str
    age_years: float
    noise: N

    def attributes(self, years_later: float = 0.0) -> Attributes:
        """Age, sex and diagnosis at a visit; age in tenths of a year."""
        return {"age": round(self.age_years + years_later, 1), "sex": self.sex, "diagnosis": self.diagnosis}


@dataclass
class Population:
    """Distribution of a hospital's patients."""

    age_mean_years: float = 70.0
    age_sd_years: float = 8.0
    disease_share: float = 0.4
    youngest_years: float = 50.0
    oldest_years: float = 90.0
    """Limits of age at the first visit."""

    def __post_init__(self) -> None:
        require(0 <= self.disease_share <= 1, f"disease_share is {self.disease_share}: use 0 to 1")
        require(self.age_sd_years > 0, "age_sd_years must be above 0")
        require(
            18 <= self.youngest_years < self.age_mean_years < self.oldest_years <= 92,
            "use 18 <= youngest_years < age_mean_years < oldest_years <= 92",
        )


@dataclass(frozen=True, eq=False)
class Rendering:
    """An image before its acquisition."""

    contrast: Array
    """The imaged quantity (H,W) in the phantom's units; rows run to the back or the feet, columns to the left."""
    structure: Array
    """Share (H,W), 0 to 1, of the structure that disease and age change."""
    spacing_mm: float

    @property
    def area_mm2(self) -> float:
        """True area of the structure in the image."""
        return float(self.structure.sum(dtype=np.float64)) * self.spacing_mm**2


@dataclass(frozen=True)
class Growth:
    """Change of the structure's area by an edit, mm2."""

    true: float
    predicted: float
    """Best prediction from one image: the posterior mean given the visible endogenous variables."""


@dataclass(frozen=True)
class ReportTerms:
    """Terms of a report on a phantom's images."""

    origin: str
    """Source of the images."""
    structure: str
    """The structure that is measured, for example "ventricles"."""
    disease: str
    disease_short: str


class Phantom(ABC, Generic[N, D]):
    """A part of the body; `N` is its noise, `D` the config of its imaging device."""

    name: str
    disease: str
    """The diagnosis that is not `HEALTHY`."""
    terms: ReportTerms
    biomarker: str
    """Name in `BIOMARKERS` of the measure of that structure in an image."""
    device: type[D]
    views: int
    """Number of images of a visit."""
    shown_view: int
    """Index of the view that models use."""

    @abstractmethod
    def draw_noise(self, rng: np.random.Generator) -> N:
        """Draw one patient's exogenous noise."""

    @abstractmethod
    def render(self, patient: Patient[N], attributes: Attributes, device: D, view: int) -> Rendering:
        """The image of `patient` under `attributes`, before its acquisition by `device`.

        Raises:
            RequestError: an attribute is missing or has a value outside of the causal model.
        """

    @abstractmethod
    def acquire(self, rendering: Rendering, device: D, noise: N, rng: np.random.Generator) -> Array:
        """Device values (H,W) of a rendering."""

    @abstractmethod
    def write(self, folder: Path, metadata: StudyMetadata, pictures: Sequence[Array], device: D, noise: N) -> None:
        """Write a visit's images, device values (H,W) in the order of the views, as DICOM files."""

    @abstractmethod
    def predict_growth(self, patient: Patient[N], attributes: Attributes, target: Attributes) -> Growth:
        """Change of the structure when `attributes` become `target`, of the same sex."""

    def draw_patient(
        self, rng: np.random.Generator, identity: str, population: Population, diagnosis: str | None = None
    ) -> Patient[N]:
        """Draw a patient; without a `diagnosis` it is drawn as well. The generator state determines the patient."""
        age = math.inf
        while not population.youngest_years <= age <= population.oldest_years:
            age = round(rng.normal(population.age_mean_years, population.age_sd_years), 1)
        sex = "F" if rng.random() < 0.5 else "M"
        diseased = rng.random() < population.disease_share
        drawn = self.disease if diseased else HEALTHY
        return Patient(identity, sex, diagnosis or drawn, age, self.draw_noise(rng))

    def edits_of(self, attributes: Attributes) -> dict[str, Attributes]:
        """Edits of a visit by name, each with the attributes that it changes."""
        age, sex = float(attributes["age"]), attributes["sex"]
        edits: dict[str, Attributes] = {
            f"age_plus_{years:.0f}": {"age": round(age + years, 1)} for years in AGE_EDITS_YEARS
        }
        healthy = attributes["diagnosis"] == HEALTHY
        edits["disease_added" if healthy else "disease_removed"] = {"diagnosis": self.disease if healthy else HEALTHY}
        edits[SEX_EDIT] = {"sex": "M" if sex == "F" else "F"}
        return edits

    def edit_titles(self) -> dict[str, str]:
        """Titles of the edits."""
        titles = {f"age_plus_{years:.0f}": f"{years:.0f} years older" for years in AGE_EDITS_YEARS}
        titles["disease_added"] = f"with {self.terms.disease_short}"
        titles["disease_removed"] = f"without {self.terms.disease_short}"
        return titles | {SEX_EDIT: "of the other sex"}


def known_attributes(attributes: Attributes, disease: str) -> tuple[float, str, bool]:
    """Age in years, sex, and whether the patient has `disease`.

    Raises:
        RequestError: an attribute is missing or has a value outside of the causal model.
    """
    try:
        age, sex, diagnosis = float(attributes["age"]), str(attributes["sex"]), str(attributes["diagnosis"])
    except KeyError as error:
        raise RequestError(f"attribute {error} is missing: the causal model needs age, sex and diagnosis") from error
    if sex not in ("M", "F") or diagnosis not in (HEALTHY, disease):
        values = f"M and F, {HEALTHY} and {disease}"
        raise RequestError(f"sex={sex}, diagnosis={diagnosis}: the causal model has {values}")
    return age, sex, diagnosis == disease
