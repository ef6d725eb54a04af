"""How far drawn changes were from the truth over the years: bands, and the curve of the cohort that was judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ld_common.core.errors import RequestError
from ld_common.imaging.modality import AGE, Attributes, Modality
from ld_common.metrics.bands import JUDGED_BY, LEVEL, fit_band
from ld_common.metrics.cohort import fit_cohort
from ld_evaluate.edits import EvaluationEdit
from ld_evaluate.files import FOLLOW_UP
from ld_evaluate.protocol import PatientAnswer

ONE_SCAN, HISTORY = "one_scan", "history"
"""Bands of answers to one scan, and of answers that earlier visits calibrated."""


@dataclass
class TimedErrors:
    """Drawn less true change of answers to edits that change the age alone; lists of N."""

    errors_mm2: list[float] = field(default_factory=list)
    years: list[float] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)
    edits: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, modality: Modality, edits: Sequence[EvaluationEdit], answers: Sequence[PatientAnswer]) -> TimedErrors:
        """Errors of the first biomarker; `answers` are to some of the edits."""
        errors, passed = cls(), {(edit.patient, edit.name): years_of(edit) for edit in edits}
        for answer in answers:
            years = passed.get((answer.patient, answer.edit), 0.0)
            if years > 0 and modality.biomarkers and modality.biomarkers[0] in answer.growth_mm2:
                name = modality.biomarkers[0]
                errors.errors_mm2.append(answer.growth_mm2[name] - answer.true_growth_mm2[name])
                errors.years.append(years)
                errors.patients.append(answer.patient)
                errors.edits.append(answer.edit)
        return errors

    def band(self) -> dict[str, Any] | None:
        """Their band as JSON has it, with the number of patients by the origin of the truth; None for too few."""
        try:
            band = fit_band(self.errors_mm2, self.years, self.patients, LEVEL)
        except RequestError:
            return None
        origins: dict[str, set[str]] = {}
        for patient, edit in zip(self.patients, self.edits, strict=True):
            origins.setdefault("follow_ups" if edit == FOLLOW_UP else "true_counterfactuals", set()).add(patient)
        return band.state() | {"truth": {name: len(found) for name, found in sorted(origins.items())}}


def years_of(edit: EvaluationEdit) -> float:
    """Years that an edit asks for where it changes the age alone; else 0."""
    if set(edit.target) != {AGE} or isinstance(edit.target[AGE], str):
        return 0.0
    return float(edit.target[AGE]) - float(edit.source[AGE])


def history_band(errors: TimedErrors, spreads: Sequence[float]) -> dict[str, Any] | None:
    """The band of answers calibrated by histories of these spreads in years²; None for too few.

    `least_spread_years2` is that of the `JUDGED_BY`-th shortest, so that it is no single patient's.
    """
    band = errors.band()
    if band is None:
        return None
    return band | {"least_spread_years2": round(float(np.sort(spreads)[JUDGED_BY - 1]), 2)}


def bands_section(modality: Modality, bands: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    """Bands by `ONE_SCAN` and `HISTORY`, as an evaluation has them; empty without any."""
    known = {name: band for name, band in bands.items() if band is not None}
    return {"biomarker": modality.biomarkers[0], **known} if known else {}


def cohort_section(modality: Modality, edits: Sequence[EvaluationEdit]) -> dict[str, Any]:
    """Curves of the first biomarker on the judged scans and their follow-ups, as an evaluation has them.

    Empty for too few patients, or a modality without an age or a biomarker.
    """
    if not modality.biomarkers or AGE not in modality.attributes or modality.attributes[AGE].categories:
        return {}
    name = modality.biomarkers[0]
    scans: dict[tuple[str, float], tuple[float, Attributes]] = {}
    for edit in edits:
        if name not in edit.scanned.areas_mm2:
            continue
        area = edit.scanned.areas_mm2[name]
        scans[edit.patient, float(edit.source[AGE])] = (area, edit.source)
        if edit.name == FOLLOW_UP and edit.truth is not None and name in edit.truth.growth_mm2:
            later = edit.source | edit.target
            scans[edit.patient, float(later[AGE])] = (area + edit.truth.growth_mm2[name], later)
    kinds = [kind for kind, attribute in modality.attributes.items() if attribute.categories]
    try:
        curves = fit_cohort(
            [age for _, age in scans],
            [area for area, _ in scans.values()],
            [patient for patient, _ in scans],
            [{kind: str(attributes[kind]) for kind in kinds} for _, attributes in scans.values()],
        )
    except RequestError:
        return {}
    return {"biomarker": name, "curves": [curve.state() for curve in curves]} if curves else {}
