"""Simulated patients with all visits, and the questions whose true answers the causal model knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ld_common.diffusion.base_model import BaseModel
from ld_common.imaging.geometry import Frame, Scan, to_model
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.rendering import picture_of
from ld_common.metrics.registry import BIOMARKERS
from ld_simulations.hospitals import SimulatedVisit, draw_visits, scan
from ld_simulations.hospitals_config import HospitalConfig, HospitalsConfig
from ld_simulations.phantoms.base import Phantom
from ld_simulations.phantoms.registry import find_phantom

YEARS_ON = (5, 10)
"""After the last visit, where there is a history."""
BETWEEN = {"age_plus_5": 5, "age_plus_15": 15}
"""Further questions after the first visit, for the curve of the answers over time."""
FOLLOW_UP = "follow_up"
"""The real last visit, predicted from the first."""
EXTRA = (*BETWEEN, FOLLOW_UP)
"""Questions that are judged and not tuned on."""
LEAST_HISTORY = 3
"""Visits of a patient that is asked with a history, the last one among them."""


@dataclass(frozen=True, eq=False)
class ScannedVisit:
    """One visit's scan."""

    attributes: Attributes
    scan: Scan
    frame: Frame
    latent: Tensor
    """`(C,h,w)`, what the base's encoder makes of it."""
    area_mm2: float
    """Of the structure, as the causal model knows it."""
    measured_mm2: float
    """The same by the modality's first biomarker."""
    mirrored: Tensor | None = None
    """`latent` of the mirror image; None where left and right are not alike."""


@dataclass(frozen=True, eq=False)
class Question:
    """One scan under other attributes."""

    name: str
    visit: int
    """Index of the scan's visit; the earlier ones are its history."""
    target: Attributes
    """All attributes of the answer."""
    pixels: np.ndarray
    """The true counterfactual `(H,W)`."""
    growth_mm2: float
    """True change of the structure's area."""


@dataclass(frozen=True, eq=False)
class Person:
    """A patient; `questions` is empty for those whom rules learn from."""

    hospital: str
    identity: str
    visits: list[ScannedVisit]
    questions: list[Question]


def with_mirror_images(people: Sequence[Person]) -> list[Person]:
    """The people, and each again as the mirror images show them, where left and right are alike."""
    twins = [
        replace(person, visits=[replace(visit, latent=visit.mirrored, mirrored=None) for visit in person.visits])
        for person in people
        if all(visit.mirrored is not None for visit in person.visits)
    ]
    return [*people, *twins]


def without_mirror_images(person: Person) -> Person:
    """The person as the scans alone show it."""
    return replace(person, visits=[replace(visit, mirrored=None) for visit in person.visits])


class People:
    """Draws the patients of one anatomy."""

    def __init__(self, hospitals: HospitalsConfig, modality: Modality, base: BaseModel) -> None:
        self.hospitals, self.modality, self.base = hospitals, modality, base
        self.phantom: Phantom[Any, Any] = find_phantom(hospitals.phantom)

    def draw(self, seed: int, patients: int, first: int, last: int, questions: bool) -> Iterator[Person]:
        """Patients `first` to `last` of the `patients` of each hospital; test patients where there are questions."""
        for hospital in self.hospitals.hospitals:
            yield from self._of_hospital(hospital, (seed, patients), first, last, questions)

    def draw_of(self, hospital: str, seed: int, patients: int, first: int, last: int) -> Iterator[Person]:
        """The same for one hospital, by its name, without questions."""
        (chosen,) = (each for each in self.hospitals.hospitals if each.name == hospital)
        yield from self._of_hospital(chosen, (seed, patients), first, last, questions=False)

    def picture(self, values: np.ndarray, visit: ScannedVisit) -> Tensor:
        """The model's picture `(1,S,S)` of values in a visit's grid."""
        return picture_of(values, visit.frame, self.base.resolution, self.modality.image)

    def measure(self, picture: Tensor, frame: Frame) -> float:
        """The modality's first biomarker, mm2."""
        pixel_mm = frame.field_of_view / picture.shape[-1]
        return float(BIOMARKERS.load(self.modality.biomarkers[0])(picture[None], pixel_mm)[0])

    def _of_hospital(
        self, hospital: HospitalConfig, drawn: tuple[int, int], first: int, last: int, questions: bool
    ) -> Iterator[Person]:
        seed, patients = drawn
        sized = HospitalConfig(**{**vars(hospital), "patients": patients, "test_patients": patients})
        for visits in draw_visits(self.phantom, seed, sized, questions)[first:last]:
            yield self._person(sized, visits, questions)

    def _person(self, hospital: HospitalConfig, drawn: list[SimulatedVisit], questions: bool) -> Person:
        visits = self._visits(hospital, drawn)
        asked = list(self._questions(hospital, drawn, visits)) if questions else []
        return Person(hospital.name, drawn[0].patient.identity, visits, asked)

    def _visits(self, hospital: HospitalConfig, drawn: list[SimulatedVisit]) -> list[ScannedVisit]:
        spacing = hospital.scanner.spacing_mm
        scans, pictures, areas = [], [], []
        for visit in drawn:
            values, rendering = self._scan(hospital, visit, visit.attributes)
            scans.append(Scan(values, (spacing, spacing), {}))
            pictures.append(to_model(scans[-1], self.base.resolution, self.modality.image))
            areas.append(rendering)
        images = torch.stack([picture for picture, _ in pictures])
        latents, mirrored = self.base.encode(images).cpu(), [None] * len(drawn)
        if self.modality.image.symmetric:
            mirrored = list(self.base.encode(images.flip(-1)).cpu())
        return [
            ScannedVisit(visit.attributes, read, frame, latent, area, self.measure(picture, frame), twin)
            for visit, read, (picture, frame), latent, area, twin in zip(
                drawn, scans, pictures, latents, areas, mirrored, strict=True
            )
        ]

    def _questions(
        self, hospital: HospitalConfig, drawn: list[SimulatedVisit], visits: list[ScannedVisit]
    ) -> Iterator[Question]:
        first, last = drawn[0], drawn[-1]
        edits = {
            name: (0, first.attributes | target) for name, target in self.phantom.edits_of(first.attributes).items()
        }
        age = float(first.attributes["age"])
        edits |= {name: (0, first.attributes | {"age": round(age + years, 1)}) for name, years in BETWEEN.items()}
        if len(drawn) >= LEAST_HISTORY:
            age = float(last.attributes["age"])
            for years in YEARS_ON:
                edits[f"history_{years}"] = (len(drawn) - 1, last.attributes | {"age": round(age + years, 1)})
        for name, (index, target) in edits.items():
            values, area = self._scan(hospital, drawn[index], target)
            yield Question(name, index, target, values, area - visits[index].area_mm2)
        if len(visits) > 1:
            seen = visits[-1]
            yield Question(FOLLOW_UP, 0, seen.attributes, seen.scan.pixels, seen.area_mm2 - visits[0].area_mm2)

    def _scan(
        self, hospital: HospitalConfig, visit: SimulatedVisit, attributes: Attributes
    ) -> tuple[np.ndarray, float]:
        values, rendering = scan(self.phantom, visit, attributes, self.phantom.shown_view, hospital.scanner)
        return values.astype(np.float32), rendering.area_mm2
