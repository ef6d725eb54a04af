"""How well one image can tell a patient's growth by the rate of ageing: the highest correlation in unwarped heads.

A patient's own shape, which an image shows as well, decides more of how much grows, so predictions of the growth of
patients' own shapes can correlate more.

A patient's rate of ageing is not visible in one image, only its result so far. Given the image, its attributes and the
edit, the best prediction is the posterior mean of the change given the visible endogenous variables
(`Phantom.predict_growth`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ld_common.core.seeding import numpy_generator
from ld_simulations.phantoms.base import SEX_EDIT, Growth, Phantom, Population
from ld_simulations.phantoms.brain import BRAIN
from ld_simulations.side_by_side import side_by_side

PATIENTS_OF_PART = 100


@dataclass(frozen=True)
class GrowthCeiling:
    """Highest reachable correlation between predicted and true change of the structure's area."""

    overall: float
    """Over all patients and edits together; the kind of edit explains most of it."""
    by_edit: dict[str, float]
    """Over patients, for each edit."""


def growth_ceiling(
    populations: Sequence[Population], patients: int = 4000, seed: int = 0, phantom: Phantom[Any, Any] = BRAIN
) -> GrowthCeiling:
    """The ceiling over `patients` drawn from the populations in turn, at their first visit, under all edits but sex."""
    rng = numpy_generator(seed, "growth-ceiling")
    true: dict[str, list[float]] = {}
    best: dict[str, list[float]] = {}
    drawn = [phantom.draw_patient(rng, str(index), populations[index % len(populations)]) for index in range(patients)]
    parts = [drawn[first : first + PATIENTS_OF_PART] for first in range(0, patients, PATIENTS_OF_PART)]
    for name, growth in itertools.chain.from_iterable(side_by_side(functools.partial(_predicted, phantom), parts)):
        true.setdefault(name, []).append(growth.true)
        best.setdefault(name, []).append(growth.predicted)
    by_edit = {name: _correlation(true[name], best[name]) for name in true}
    together = (list(itertools.chain.from_iterable(values.values())) for values in (true, best))
    return GrowthCeiling(_correlation(*together), by_edit)


def _predicted(phantom: Phantom[Any, Any], patients: Sequence[Any]) -> list[tuple[str, Growth]]:
    """By edit, the growth of each patient."""
    growths = []
    for patient in patients:
        attributes = patient.attributes()
        for name, target in phantom.edits_of(attributes).items():
            if name != SEX_EDIT:
                growths.append((name, phantom.predict_growth(patient, attributes, {**attributes, **target})))
    return growths


def _correlation(first: list[float], second: list[float]) -> float:
    return float(np.corrcoef(first, second)[0, 1])
