"""The rule that knows a patient's attributes and no picture: growth a year by a linear fit to the training patients.

    dA/dt = γ · [1, φ(c)]

φ are the attribute features of the longitudinal drift, and γ is the least-squares fit to the measured areas of all
pairs of visits. Whatever an answer tells beyond this rule, it has read off the scan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from ld_common.diffusion.longitudinal_sums import attribute_features
from ld_common.imaging.modality import Attributes, Modality
from ld_simulations.benchmarks.individual.answers import ATTRIBUTES, Record
from ld_simulations.benchmarks.individual.people import BETWEEN, YEARS_ON, People, Person
from ld_simulations.hospitals import draw_visits
from ld_simulations.hospitals_config import HospitalConfig

Predicted = dict[str, dict[str, float]]
"""Growth in mm2 by patient and question."""


def predict_by_attributes(training: Sequence[Person], people: People, seed: int, patients: int) -> Predicted:
    """The rule's answers to the test patients' questions of time.

    Args:
        training: whom the rule is fitted to.
        people: draws the test patients.
        seed: of the test patients.
        patients: of them in each hospital.
    """
    rates = _fit(training, people.modality)
    predicted: Predicted = {}
    for hospital in people.hospitals.hospitals:
        sized = HospitalConfig(**{**vars(hospital), "test_patients": patients})
        for visits in draw_visits(people.phantom, seed, sized, held_out=True):
            first, last = visits[0].attributes, visits[-1].attributes
            asked = {name: (first, float(years)) for name, years in BETWEEN.items()}
            asked |= {
                name: (first, float(target["age"]) - float(first["age"]))
                for name, target in people.phantom.edits_of(first).items()
                if set(target) == {"age"}
            }
            asked |= {f"history_{years}": (last, float(years)) for years in YEARS_ON}
            predicted[f"{hospital.name}/{visits[0].patient.identity}"] = {
                name: years * float(_features(people.modality, _later(attributes, years / 2)) @ rates)
                for name, (attributes, years) in asked.items()
            }
    return predicted


def with_attributes_rule(records: Sequence[Record], predicted: Mapping[str, Mapping[str, float]]) -> list[Record]:
    """The records with the rule's row, where it has an answer."""
    asked = {(record["patient"], record["question"]): record for record in records}
    rows = [
        record | {"row": ATTRIBUTES, "gain_db": None, "growth_mm2": predicted[patient][question]}
        for (patient, question), record in asked.items()
        if question in predicted.get(patient, {})
    ]
    return [*records, *rows]


def _fit(training: Sequence[Person], modality: Modality) -> np.ndarray:
    rows, growth = [], []
    for years, middle, grown in _pairs(training):
        rows.append(years * _features(modality, middle))
        growth.append(grown)
    rates: np.ndarray = np.linalg.lstsq(np.array(rows), np.array(growth), rcond=None)[0]
    return rates


def _pairs(training: Sequence[Person]) -> Iterator[tuple[float, Attributes, float]]:
    """Years, attributes half-way and measured growth of all pairs of visits."""
    for person in training:
        for first in person.visits:
            for last in person.visits:
                years = float(last.attributes["age"]) - float(first.attributes["age"])
                if years > 0:
                    yield years, _later(first.attributes, years / 2), last.measured_mm2 - first.measured_mm2


def _later(attributes: Attributes, years: float) -> Attributes:
    return attributes | {"age": float(attributes["age"]) + years}


def _features(modality: Modality, attributes: Attributes) -> np.ndarray:
    design = torch.tensor([modality.design_vector(attributes)], dtype=torch.float64)
    features: np.ndarray = np.append(1.0, attribute_features(design, modality.numeric_columns)[0].numpy())
    return features
