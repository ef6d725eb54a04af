"""The ridges that a method must beat: they learn from others only, and from nobody where nobody comes twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.imaging.geometry import Scan
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.scan_table import ScanTable, read_scan_table
from ld_evaluate.comparison import Comparison
from ld_evaluate.dataset import read_data
from ld_evaluate.edits import EvaluationEdit, ScanPixels
from ld_evaluate.files import COPY, CROSS_SECTIONAL, LONGITUDINAL
from ld_evaluate.ridge_rules import ridge_answers
from tests.support.ageing import BASE, write_ageing_hospital

PATIENTS, SIDE = 12, 16


@pytest.fixture(scope="module")
def base(smallest_base: Path) -> BaseModel:
    return load_base(str(smallest_base))


def attributes(patient: int, visit: int) -> Attributes:
    return {"age": 60.0 + patient + 3 * visit, "sex": "FM"[patient % 2], "diagnosis": ("CN", "AD")[patient // 2 % 2]}


def table(visits: int = 2) -> ScanTable:
    """Patients whose pictures brighten with the years."""
    generator = torch.Generator().manual_seed(0)
    images, shown, names = [], [], []
    for patient in range(PATIENTS):
        own = torch.rand(1, SIDE, SIDE, generator=generator) - 1
        for visit in range(visits):
            images.append((own + 0.1 * visit).clamp(-1, 1))
            shown.append(attributes(patient, visit))
            names.append(f"p{patient}")
    return ScanTable(torch.stack(images), shown, names)


def edits_of(visits: ScanTable, modality: Modality) -> list[EvaluationEdit]:
    """Everybody ten years older."""
    edits = []
    for number, name in enumerate(dict.fromkeys(visits.patients)):
        row = visits.patients.index(name)
        scan = Scan(visits.images[row, 0].numpy(), (200 / SIDE, 200 / SIDE), {})
        source = visits.attributes[row]
        target: Attributes = {"age": float(source["age"]) + 10}
        pixels = ScanPixels.of(scan, modality, SIDE)
        edits.append(EvaluationEdit(name, number, "age_plus_10", source, target, pixels))
    return edits


@pytest.mark.slow
def test_an_answer_to_a_patient_is_learned_from_others_alone(base: BaseModel, brain_mri: Modality) -> None:
    visits = table()
    edits = edits_of(visits, brain_mri)
    answers = ridge_answers(base, brain_mri, edits, visits)
    changed = ScanTable(visits.images.clone(), visits.attributes, visits.patients)
    changed.images[1] = -changed.images[1]  # the later visit of the first patient
    again = ridge_answers(base, brain_mri, edits, changed)
    for name in (CROSS_SECTIONAL, LONGITUDINAL):
        mine, others = answers[name], again[name]
        assert all(answer is not None for answer in mine)
        np.testing.assert_array_equal(mine[0], others[0])
        moved = [not np.array_equal(mine[row], others[row]) for row in range(1, PATIENTS)]
        assert sum(moved) > PATIENTS / 2


@pytest.mark.slow
def test_the_reference_teaches_where_it_has_patients_with_two_visits(base: BaseModel, brain_mri: Modality) -> None:
    visits = table()
    edits = edits_of(visits, brain_mri)
    other = ScanTable(table().images.flip(0), visits.attributes, [f"other {name}" for name in visits.patients])
    by_reference = ridge_answers(base, brain_mri, edits, visits, other)
    swapped = ScanTable(-visits.images, visits.attributes, visits.patients)
    np.testing.assert_array_equal(
        np.array(by_reference[LONGITUDINAL]),
        np.array(ridge_answers(base, brain_mri, edits, swapped, other)[LONGITUDINAL]),
    )
    single = other.rows(list(range(0, len(other.patients), 2)))
    by_visits = ridge_answers(base, brain_mri, edits, visits, single)
    assert not np.array_equal(np.array(by_visits[LONGITUDINAL]), np.array(by_reference[LONGITUDINAL]))


def test_there_is_no_ridge_where_nobody_comes_twice(base: BaseModel, brain_mri: Modality) -> None:
    visits = table(visits=1)
    assert ridge_answers(base, brain_mri, edits_of(visits, brain_mri), visits) == {}


@pytest.mark.slow
def test_the_longitudinal_ridge_is_nearer_to_rendered_patients_than_their_scans(
    tmp_path: Path, brain_mri: Modality
) -> None:
    hospital, base = write_ageing_hospital(tmp_path / "hospital", patients=24, test_patients=4), load_base(str(BASE))
    data = read_data(hospital / "held_out", brain_mri, base.resolution)
    assert data.visits is not None
    reference = read_scan_table(hospital / "scans.csv", brain_mri, base.resolution)
    ridges = ridge_answers(base, brain_mri, data.asked, data.visits, reference)
    rules = Comparison(base, brain_mri, data.asked, ridges).rule_numbers()
    for edit in ("age_plus_10", "age_plus_20"):
        assert rules[LONGITUDINAL][edit]["gain_db"] > 2
        assert rules[COPY][edit]["gain_db"] == 0
        assert rules[LONGITUDINAL][edit]["gain_db"] > rules[CROSS_SECTIONAL][edit]["gain_db"]
