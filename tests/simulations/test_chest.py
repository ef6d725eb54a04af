"""The chest's causal model: what its interventions do, what they leave alone, and that its heart can be measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ld_common.core.config import load_config
from ld_common.core.errors import ConfigError, RequestError
from ld_common.imaging.geometry import Scan, to_model
from ld_common.imaging.modality import Attributes, Modality
from ld_common.metrics.biomarkers import heart_areas_mm2
from ld_simulations.phantoms.base import Patient, Population, Rendering
from ld_simulations.phantoms.chest import CHEST
from ld_simulations.phantoms.chest_anatomy import FLOOR_MM, effusion_share, ray_lengths
from ld_simulations.phantoms.chest_scm import ChestNoise, grid_points, render_state, shape_of, state_of, warped
from ld_simulations.phantoms.detector import DetectorConfig, expose
from ld_simulations.phantoms.growth_ceiling import growth_ceiling
from ld_simulations.phantoms.registry import find_phantom

CHEST_RADIOGRAPH = Path(__file__).parents[2] / "configs/modalities/chest_radiograph.yaml"
SHAPE, SPACING_MM = (96, 96), 3.9
AGES_YEARS = (50, 60, 70, 80, 90, 100)


@pytest.fixture(scope="module")
def patients() -> list[Patient[ChestNoise]]:
    return [CHEST.draw_patient(np.random.default_rng(seed), str(seed), Population()) for seed in range(8)]


def attributes(age: float = 70, sex: str = "F", diagnosis: str = "CN") -> Attributes:
    return {"age": age, "sex": sex, "diagnosis": diagnosis}


def picture(patient: Patient[ChestNoise], target: Attributes) -> Rendering:
    return render_state(patient.noise, state_of(patient.noise, target), SHAPE, SPACING_MM)


def test_same_noise_and_attributes_give_the_same_picture(patients: list[Patient[ChestNoise]]) -> None:
    again = CHEST.draw_patient(np.random.default_rng(0), "0", Population())
    first, second = (picture(patient, attributes()) for patient in (patients[0], again))
    np.testing.assert_array_equal(first.contrast, second.contrast)
    np.testing.assert_array_equal(first.structure, second.structure)
    other = picture(patients[1], attributes())
    assert np.abs(other.contrast - first.contrast).max() > 0.3


def test_a_disease_that_is_removed_and_added_again_leaves_no_trace(patients: list[Patient[ChestNoise]]) -> None:
    factual = attributes(diagnosis="HF")
    removed = {**factual, **CHEST.edits_of(factual)["disease_removed"]}
    restored = {**removed, **CHEST.edits_of(removed)["disease_added"]}
    np.testing.assert_array_equal(picture(patients[0], restored).contrast, picture(patients[0], factual).contrast)


def test_attenuation_is_finite_none_beside_the_body_and_least_in_the_lungs(patients: list[Patient[ChestNoise]]) -> None:
    for patient in patients:
        for target in (attributes(50), attributes(100, "M", "HF")):
            contrast = picture(patient, target).contrast
            assert contrast.dtype == np.float32 and np.isfinite(contrast).all()
            assert contrast.min() == 0 and 3 < contrast.max() < 8
        lung, heart, belly = contrast[30:40, 28:36], contrast[55:62, 52:58], contrast[86:, 40:60]
        assert lung.mean() + 0.5 < heart.mean() and lung.mean() + 0.5 < belly.mean()


def test_the_heart_points_to_the_patients_left_and_the_right_dome_stands_higher(
    patients: list[Patient[ChestNoise]],
) -> None:
    for patient in patients:
        rendering = picture(patient, attributes())
        columns = np.flatnonzero(rendering.structure.sum(0) > 1) - SHAPE[1] / 2
        assert columns.max() > -columns.min() + 4
        # straight down the middle of each lung, the belly begins where attenuation rises most
        right, left = (np.argmax(np.diff(rendering.contrast[45:85, c : c + 6].mean(1))) for c in (25, 66))
        assert right < left


def test_the_heart_grows_with_age_and_with_failure_in_every_patient(patients: list[Patient[ChestNoise]]) -> None:
    for patient in patients:
        healthy = [picture(patient, attributes(age)).area_mm2 for age in AGES_YEARS]
        failing = [picture(patient, attributes(age, diagnosis="HF")).area_mm2 for age in AGES_YEARS]
        assert np.all(np.diff(healthy) > 0) and np.all(np.diff(failing) > 0)
        assert np.all(np.greater(failing, np.multiply(healthy, 1.1)))


def test_the_heart_takes_a_usual_share_of_the_thorax(patients: list[Patient[ChestNoise]]) -> None:
    def ratio(patient: Patient[ChestNoise], target: Attributes) -> float:
        rendering = picture(patient, target)
        width = (rendering.structure.max(0) > 0.5).sum() * SPACING_MM
        return width / (276 * state_of(patient.noise, target).size)

    healthy, failing = (
        np.mean([ratio(patient, attributes(65, diagnosis=diagnosis)) for patient in patients])
        for diagnosis in ("CN", "HF")
    )
    assert 0.40 < healthy < 0.52 and 0.53 < failing < 0.68


def test_each_attribute_moves_what_the_equations_say_and_nothing_else(patients: list[Patient[ChestNoise]]) -> None:
    for patient in patients:
        before = state_of(patient.noise, attributes())
        older, failing, man = (
            state_of(patient.noise, attributes(**change))  # type: ignore[arg-type]
            for change in ({"age": 85}, {"diagnosis": "HF"}, {"sex": "M"})
        )
        assert older == replace(before, heart=older.heart, unfolding=older.unfolding, descent_mm=older.descent_mm)
        assert (
            older.heart > before.heart and older.unfolding > before.unfolding and older.descent_mm < before.descent_mm
        )
        assert failing == replace(
            before,
            heart=failing.heart,
            effusion_mm=failing.effusion_mm,
            opacity=failing.opacity,
            descent_mm=failing.descent_mm,
        )
        assert min(failing.effusion_mm) > 0 and failing.opacity > 0 and before.opacity == max(before.effusion_mm) == 0
        assert man == replace(before, size=man.size, heart=man.heart, breast_mm=man.breast_mm)
        assert man.size > before.size and man.breast_mm < before.breast_mm
        # the rate of ageing is the patient's, whatever the sex: the heart grows by the same
        grown = [state_of(patient.noise, attributes(85, sex)).heart for sex in "FM"]
        assert grown[0] - before.heart == pytest.approx(grown[1] - man.heart)


def test_growth_follows_the_patients_own_rate(patients: list[Patient[ChestNoise]]) -> None:
    slow, fast = (replace(patients[0], noise=replace(patients[0].noise, rate=rate)) for rate in (0.7, 1.4))
    growth = [
        picture(patient, attributes(80)).area_mm2 - picture(patient, attributes(60)).area_mm2
        for patient in (slow, fast)
    ]
    assert growth[1] > 1.6 * growth[0]


def test_fluid_alone_changes_the_costophrenic_region_only(patients: list[Patient[ChestNoise]]) -> None:
    for patient in patients:
        noise, dry = patient.noise, state_of(patient.noise, attributes())
        wet = replace(dry, effusion_mm=(60.0, 0.0))
        before, after = (render_state(noise, state, SHAPE, SPACING_MM).contrast for state in (dry, wet))
        u, v = warped(noise, dry.size, grid_points(SHAPE, SPACING_MM))
        below = (u < 0) & (v > FLOOR_MM + dry.descent_mm - 60)
        np.testing.assert_array_equal(before[~below], after[~below])
        assert (after - before).min() > -1e-5 and (after - before)[below].max() > 0.5
        # the meniscus: fluid stands highest at the wall
        share = effusion_share(shape_of(noise, wet), u, v)
        top = [np.argmax(share[:, column] > 0.5) for column in (16, 40)]
        assert top[0] < top[1]


def test_opacity_alone_changes_the_lungs_only(patients: list[Patient[ChestNoise]]) -> None:
    noise, clear = patients[0].noise, state_of(patients[0].noise, attributes())
    before, after = (
        render_state(noise, replace(clear, opacity=opacity), SHAPE, SPACING_MM).contrast for opacity in (0.0, 0.3)
    )
    u, v = warped(noise, clear.size, grid_points(SHAPE, SPACING_MM))
    airless = np.abs(u) > 140
    np.testing.assert_array_equal(before[airless], after[airless])
    assert (after - before).min() > -1e-5
    hilum = (np.abs(np.abs(u) - 52) < 10) & (np.abs(v) < 12)
    assert (after - before)[hilum].mean() > 0.25


def test_lengths_are_those_of_a_body(patients: list[Patient[ChestNoise]]) -> None:
    noise = patients[0].noise
    u, v = grid_points(SHAPE, SPACING_MM)
    lengths = ray_lengths(shape_of(noise, state_of(noise, attributes())), u, v, np.zeros_like(u))
    assert lengths.soft.min() >= 0 and lengths.bone.min() >= 0
    assert 180 < lengths.soft.max() < 320 and lengths.bone.max() < 60


def test_edits_stay_within_what_the_modality_knows() -> None:
    modality = load_config(Modality, CHEST_RADIOGRAPH)
    for diagnosis, change in (("CN", "disease_added"), ("HF", "disease_removed")):
        factual = attributes(79.0, "M", diagnosis)
        edits = CHEST.edits_of(factual)
        assert set(edits) == {"age_plus_10", "age_plus_20", change, "other_sex"} <= set(CHEST.edit_titles())
        for target in edits.values():
            assert modality.prompt({**factual, **target}) != modality.prompt(factual)
            assert all(modality.parse(name, str(value)) == value for name, value in target.items())


def test_the_foretold_growth_is_the_rendered_one_where_the_rate_is_certain(patients: list[Patient[ChestNoise]]) -> None:
    for patient in patients:
        # no warp: the closed form leaves it out
        plain = replace(patient, noise=replace(patient.noise, warp_mm=np.zeros_like(patient.noise.warp_mm)))
        for target in (attributes(85), attributes(70, diagnosis="HF")):
            rendered = picture(plain, target).area_mm2 - picture(plain, attributes()).area_mm2
            growth = CHEST.predict_growth(plain, attributes(), target)
            assert growth.true == pytest.approx(rendered, rel=0.03)
            assert growth.predicted > 0


def test_the_growth_ceiling_lies_between_chance_and_certainty() -> None:
    ceiling = growth_ceiling([Population()], patients=400, phantom=CHEST)
    assert 0.9 < ceiling.overall < 1
    assert set(ceiling.by_edit) == {"age_plus_10", "age_plus_20", "disease_added", "disease_removed"}
    assert all(0.4 < value < 0.97 for value in ceiling.by_edit.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "detector",
    [
        DetectorConfig(),
        pytest.param(
            DetectorConfig(digital=False, scatter_share=0.45, photons=6e4, gamma=0.8, s_curve=0.1, bits_stored=10),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            DetectorConfig(digital=False, scatter_share=0.35, gamma=1.3, darkest_attenuation=1.0, s_curve=0.5),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_hearts_area_is_read_from_pictures_of_any_detector(detector: DetectorConfig) -> None:
    image = load_config(Modality, CHEST_RADIOGRAPH).image
    pictures, known = [], []
    for seed in range(9):
        patient = CHEST.draw_patient(np.random.default_rng(100 + seed), str(seed), Population(age_mean_years=65))
        window = None
        for target in ({}, {"age": 90.0}, {"diagnosis": "CN"}, {"diagnosis": "HF"}):
            rendering = CHEST.render(patient, {**patient.attributes(), **target}, detector, 0)
            values = CHEST.acquire(rendering, detector, patient.noise, np.random.default_rng(1))
            model_picture, frame = to_model(Scan(values, (detector.spacing_mm,) * 2, {}), 64, image, window)
            window = window or frame
            pictures.append(model_picture)
            known.append(rendering.area_mm2)
    seen = torch.stack(pictures)
    measured = heart_areas_mm2(seen, 360 / 64).double().numpy().reshape(9, 4)
    true = np.array(known).reshape(9, 4)
    assert np.corrcoef(measured.ravel(), true.ravel())[0, 1] > 0.9
    assert np.mean(np.abs(measured - true)) < 0.15 * true.mean()
    changes = (measured[:, 3] - measured[:, 2], true[:, 3] - true[:, 2])
    assert (changes[0] > 0).all() and 0.8 < changes[0].mean() / changes[1].mean() < 1.4
    grown = np.concatenate([(measured[:, k] - measured[:, 0], true[:, k] - true[:, 0]) for k in (1, 2, 3)], axis=1)
    assert np.corrcoef(grown)[0, 1] > 0.8
    # contrast and scale do not matter
    np.testing.assert_allclose(heart_areas_mm2(0.3 * seen - 0.6, 360 / 64).numpy(), measured.ravel(), rtol=1e-3)


def test_a_blank_picture_has_no_heart() -> None:
    assert heart_areas_mm2(torch.full((2, 1, 64, 64), -1.0), 5.6).tolist() == [0.0, 0.0]


def test_more_attenuation_is_brighter_and_scatter_takes_contrast_away() -> None:
    attenuation = np.full((200, 200), 2.0, np.float32)
    attenuation[:, 100:] = 3.0
    clean, scattered = (
        expose(attenuation, DetectorConfig(scatter_share=share, photons=1e9, s_curve=0), np.random.default_rng(0))
        for share in (0.0, 0.5)
    )
    assert clean[:, :80].mean() < clean[:, 120:].mean()
    # near the border between the two, where the one side's scattered light falls on the other
    steps = [float(values[:, 112].mean() - values[:, 88].mean()) for values in (clean, scattered)]
    assert 0 < steps[1] < 0.8 * steps[0]


def test_what_the_model_does_not_know_is_refused(patients: list[Patient[ChestNoise]]) -> None:
    with pytest.raises(RequestError, match="diagnosis"):
        state_of(patients[0].noise, {"age": 70.0, "sex": "F"})
    with pytest.raises(RequestError, match="AD"):
        state_of(patients[0].noise, attributes(diagnosis="AD"))
    with pytest.raises(ConfigError, match="did you mean 'chest'"):
        find_phantom("chset")
    with pytest.raises(ConfigError, match="340 mm"):
        DetectorConfig(rows=100, columns=100, spacing_mm=2.0)
    with pytest.raises(ConfigError, match="DX"):
        DetectorConfig(rescale_slope=2.0)
    with pytest.raises(ConfigError, match="unsigned"):
        DetectorConfig(signed=True)
