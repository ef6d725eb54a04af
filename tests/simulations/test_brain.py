"""The causal model: what its interventions do, and what they leave alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ld_common.core.config import load_config
from ld_common.core.errors import ConfigError, RequestError
from ld_common.imaging.modality import Attributes, Modality
from ld_simulations.phantoms.base import Patient, Population, Rendering
from ld_simulations.phantoms.brain import BRAIN
from ld_simulations.phantoms.brain_anatomy import REACH_MM, SERIES_Z_MM, load_anatomy, slice_points, widened
from ld_simulations.phantoms.brain_scm import (
    CORTEX_DEPTH_MM,
    WIDENING_HIGHEST_MM,
    WIDENING_LOWEST_MM,
    render,
    render_state,
    state_of,
    warped,
)
from ld_simulations.phantoms.growth_ceiling import growth_ceiling
from tests.conftest import BRAIN_MRI

SHAPE, SPACING_MM = (64, 64), 3.125
AGES_YEARS = (50, 60, 70, 80, 90, 100)


@pytest.fixture(scope="module")
def patients() -> list[Patient]:
    return [BRAIN.draw_patient(np.random.default_rng(seed), str(seed), Population()) for seed in range(8)]


def attributes(age: float = 70, sex: str = "F", diagnosis: str = "CN") -> Attributes:
    return {"age": age, "sex": sex, "diagnosis": diagnosis}


def middle_slice(patient: Patient, target: Attributes) -> Rendering:
    return render(patient, target, SHAPE, SPACING_MM, SERIES_Z_MM[1])


def area(patient: Patient, target: Attributes) -> float:
    return middle_slice(patient, target).area_mm2


@pytest.mark.slow
def test_same_noise_and_attributes_give_the_same_picture(patients: list[Patient]) -> None:
    again = BRAIN.draw_patient(np.random.default_rng(0), "0", Population())
    first, second = (middle_slice(patient, attributes()) for patient in (patients[0], again))
    np.testing.assert_array_equal(first.contrast, second.contrast)
    np.testing.assert_array_equal(first.structure, second.structure)
    assert first.contrast.dtype == np.float32
    assert first.contrast.min() >= 0 and 0.8 < first.contrast.max() <= 1


@pytest.mark.slow
def test_ventricles_grow_with_age_and_with_disease_in_every_patient(patients: list[Patient]) -> None:
    for patient in patients:
        healthy = [area(patient, attributes(age)) for age in AGES_YEARS]
        diseased = [area(patient, attributes(age, diagnosis="AD")) for age in AGES_YEARS]
        assert np.all(np.diff(healthy) > 0) and np.all(np.diff(diseased) > 0)
        assert np.all(np.greater(diseased, healthy))


def test_ventricles_about_double_from_60_to_85_and_disease_adds_about_13_years(patients: list[Patient]) -> None:
    young, old = (np.mean([area(patient, attributes(age)) for patient in patients]) for age in (60, 85))
    assert 1.8 < old / young < 2.6
    later, diseased = (
        np.mean([area(patient, target) for patient in patients])
        for target in (attributes(78), attributes(65, "F", "AD"))
    )
    assert diseased == pytest.approx(later, rel=0.15)


def test_growth_follows_the_patients_own_rate(patients: list[Patient]) -> None:
    slow, fast = (replace(patients[0], noise=replace(patients[0].noise, rate=rate)) for rate in (0.7, 1.3))
    growth = [area(patient, attributes(75)) - area(patient, attributes(60)) for patient in (slow, fast)]
    assert growth[1] > 1.3 * growth[0]


def test_sulci_widen_with_age_and_with_disease(patients: list[Patient]) -> None:
    for patient in patients:
        targets = (attributes(55), attributes(85), attributes(85, diagnosis="AD"))
        slices = [middle_slice(patient, target) for target in targets]
        sulci = [((one.contrast > 0.02) & (one.contrast < 0.35) & (one.structure == 0)).sum() for one in slices]
        assert sulci[0] < sulci[1] < sulci[2]


def test_widening_alone_changes_nothing_far_from_the_ventricles(patients: list[Patient]) -> None:
    noise = patients[0].noise
    state = state_of(noise, attributes(60))
    before, after = (
        render_state(noise, replace(state, widening_mm=widening), SHAPE, SPACING_MM, SERIES_Z_MM[1])
        for widening in (state.widening_mm, state.widening_mm + 4)
    )
    points = warped(noise, state.size, slice_points(SHAPE, SPACING_MM, SERIES_Z_MM[1] + noise.height_mm))
    far = load_anatomy().wall_at(points.reshape(3, -1)).distance.reshape(SHAPE) > REACH_MM
    np.testing.assert_array_equal(before.contrast[far], after.contrast[far])
    assert np.abs(before.contrast - after.contrast)[~far].max() > 0.3


def test_thinning_alone_changes_nothing_far_from_the_brains_edge(patients: list[Patient]) -> None:
    noise = patients[0].noise
    state = state_of(noise, attributes(60))
    before, after = (
        render_state(noise, replace(state, thinning=thinning), SHAPE, SPACING_MM, SERIES_Z_MM[1])
        for thinning in (0.2, 0.8)
    )
    head = slice_points(SHAPE, SPACING_MM, SERIES_Z_MM[1] + noise.height_mm)
    points = widened(state.widening_mm, warped(noise, state.size, head).reshape(3, -1)).points_mm
    deep = load_anatomy().tissue_at(points).edge_distance.reshape(SHAPE) > CORTEX_DEPTH_MM[1]
    np.testing.assert_allclose(before.contrast[deep], after.contrast[deep], atol=1e-6)
    np.testing.assert_array_equal(before.structure, after.structure)
    assert np.all(after.contrast <= before.contrast + 1e-6)


def test_sex_changes_the_heads_size_and_nothing_else(patients: list[Patient]) -> None:
    for patient in patients:
        woman, man = (state_of(patient.noise, attributes(sex=sex)) for sex in "FM")
        assert (woman.widening_mm, woman.thinning) == (man.widening_mm, man.thinning)
        brain = [(middle_slice(patient, attributes(sex=sex)).contrast > 0.05).sum() for sex in "FM"]
        assert brain[1] / brain[0] == pytest.approx((man.size / woman.size) ** 2, rel=0.03)


@pytest.mark.slow
def test_warping_folds_nowhere_and_widening_only_where_there_is_fluid(patients: list[Patient]) -> None:
    axes = [np.arange(low, high, 1.0) for low, high in ((-55, 56), (-75, 50), (12, 34))]
    grid = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    for patient in patients[:4]:
        assert determinant(warped(patient.noise, 1.0, grid)).min() > 0.5
    for widening in (WIDENING_LOWEST_MM, 3.0, 6.0, 9.0, WIDENING_HIGHEST_MM):
        moved = widened(widening, grid.reshape(3, -1))
        ventricle = moved.ventricle(load_anatomy().tissue_at(moved.points_mm)).reshape(grid.shape[1:])
        folded = determinant(moved.points_mm.reshape(grid.shape)) <= 0
        # what is left at the extremes is single voxels of a finite difference
        assert (folded & (ventricle < 0.5)).mean() < 5e-4


def determinant(points: np.ndarray) -> np.ndarray:
    jacobian = np.stack([np.stack(np.gradient(part)) for part in points])
    return np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1)))


def test_edits_stay_within_what_the_modality_knows() -> None:
    modality = load_config(Modality, BRAIN_MRI)
    for diagnosis, change in (("CN", "disease_added"), ("AD", "disease_removed")):
        factual = attributes(79.0, "M", diagnosis)
        edits = BRAIN.edits_of(factual)
        assert set(edits) == {"age_plus_10", "age_plus_20", change, "other_sex"}
        for target in edits.values():
            assert modality.prompt({**factual, **target}) != modality.prompt(factual)
            assert all(modality.parse(name, str(value)) == value for name, value in target.items())


def test_the_growth_ceiling_lies_between_chance_and_certainty() -> None:
    ceiling = growth_ceiling([Population()], patients=300)
    assert 0.9 < ceiling.overall < 1
    assert set(ceiling.by_edit) == {"age_plus_10", "age_plus_20", "disease_added", "disease_removed"}
    assert all(0.4 < value < 0.97 for value in ceiling.by_edit.values())


def test_what_the_model_does_not_know_is_refused(patients: list[Patient]) -> None:
    with pytest.raises(RequestError, match="diagnosis"):
        state_of(patients[0].noise, {"age": 70.0, "sex": "F"})
    with pytest.raises(RequestError, match="MCI"):
        state_of(patients[0].noise, attributes(diagnosis="MCI"))
    with pytest.raises(ConfigError, match="disease_share"):
        Population(disease_share=1.5)
