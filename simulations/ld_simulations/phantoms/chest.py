"""The chest as a phantom that hospitals can be made of: frontal radiographs of the chest of `chest_scm`.

How much of a patient's growth can be predicted: with all else known, the heart's size K and the aorta's unfolding Q
(chest_scm.py) are two noisy readings of the rate r: K = K(S) + k + r (0.004 s + 0.18 D), Q = a + 0.02 r s. The
silhouette covers H^2 K^2 times an area that the heart's axis alone decides, so the change follows from r in closed
form. Warps are left out: they scale a patient's area and its change alike and are visible in the picture.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ld_common.imaging.modality import Attributes
from ld_simulations.phantoms import chest_scm
from ld_simulations.phantoms.base import Growth, Patient, Phantom, Rendering, ReportTerms, known_attributes
from ld_simulations.phantoms.chest_anatomy import heart_radius
from ld_simulations.phantoms.chest_scm import (
    AORTA_SD,
    HEART_SD,
    HEART_SIZE,
    RATE_LIMITS,
    RATE_SD,
    TILT_LIMIT,
    UNFOLDING_PER_YEAR,
    ChestNoise,
    ageing_years,
    grid_points,
    heart_burden,
    render_state,
    shape_of,
    silhouette,
    state_of,
)
from ld_simulations.phantoms.detector import DetectorConfig, expose
from ld_simulations.phantoms.device import Array
from ld_simulations.phantoms.radiograph import write_radiograph
from ld_simulations.phantoms.rate_posterior import Numbers, Reading, posterior_weights, rate_quantiles
from ld_simulations.phantoms.study_metadata import StudyMetadata

CURVE_TILTS = 9
CURVE_SHAPE, CURVE_SPACING_MM = (160, 160), 1.5


class Chest(Phantom[ChestNoise, DetectorConfig]):
    """Frontal radiographs; disease and age enlarge the heart."""

    name = "chest"
    disease = chest_scm.DISEASE
    terms = ReportTerms(
        origin="simulated patients: a chest from equations and the law of Beer and Lambert, deformed by a known "
        "causal model",
        structure="heart's silhouette",
        disease="heart failure",
        disease_short="heart failure",
    )
    biomarker = "heart"
    device = DetectorConfig
    views, shown_view = 1, 0

    def draw_noise(self, rng: np.random.Generator) -> ChestNoise:
        """As `chest_scm.draw_noise`."""
        return chest_scm.draw_noise(rng)

    def render(
        self, patient: Patient[ChestNoise], attributes: Attributes, device: DetectorConfig, view: int
    ) -> Rendering:
        """Attenuation of the beam from back to front, the only view."""
        return render_state(patient.noise, state_of(patient.noise, attributes), device.shape, device.spacing_mm)

    def acquire(
        self, rendering: Rendering, device: DetectorConfig, noise: ChestNoise, rng: np.random.Generator
    ) -> Array:
        """As `detector.expose`."""
        return expose(rendering.contrast, device, rng)

    def write(
        self,
        folder: Path,
        metadata: StudyMetadata,
        pictures: Sequence[Array],
        device: DetectorConfig,
        noise: ChestNoise,
    ) -> None:
        """One CR or DX file."""
        (picture,) = pictures
        write_radiograph(folder, metadata, picture, device)

    def predict_growth(self, patient: Patient[ChestNoise], attributes: Attributes, target: Attributes) -> Growth:
        """In closed form (module docstring), of a chest without warp."""
        noise, state = patient.noise, state_of(patient.noise, attributes)
        age, sex, diseased = known_attributes(attributes, chest_scm.DISEASE)
        later_age, _, later_diseased = known_attributes(target, chest_scm.DISEASE)
        now = heart_burden(age, diseased)
        rates = _rates()
        readings = (
            Reading(state.heart - HEART_SIZE[sex], now, HEART_SD),
            Reading(state.unfolding, UNFOLDING_PER_YEAR * ageing_years(age), AORTA_SD),
        )
        weights = posterior_weights(rates, readings)
        further = heart_burden(later_age, later_diseased) - now
        hearts = state.heart + further * np.append(rates, noise.rate)
        changes = (hearts**2 - state.heart**2) * state.size**2 * _standard_area(noise.tilt)
        return Growth(float(changes[-1]), float(np.average(changes[:-1], weights=weights)))


@functools.cache
def _rates() -> Numbers:
    return rate_quantiles(RATE_SD, RATE_LIMITS)


def _standard_area(tilt: float) -> float:
    """Area in mm2 of the silhouette of a heart of size 1."""
    tilts, areas = _area_curve()
    return float(np.interp(tilt, tilts, areas))


@functools.cache
def _area_curve() -> tuple[Numbers, Numbers]:
    noise = chest_scm.draw_noise(np.random.default_rng(0))
    state = replace(state_of(noise, {"age": 60.0, "sex": "M", "diagnosis": "CN"}), heart=1.0, descent_mm=0.0)
    u, v = grid_points(CURVE_SHAPE, CURVE_SPACING_MM)
    tilts = np.linspace(-TILT_LIMIT, TILT_LIMIT, CURVE_TILTS)
    shapes = [shape_of(replace(noise, tilt=float(tilt)), state) for tilt in tilts]
    shares = [silhouette(heart_radius(shape, u, v)).sum(dtype=np.float64) for shape in shapes]
    return tilts, np.array(shares) * CURVE_SPACING_MM**2


CHEST = Chest()
