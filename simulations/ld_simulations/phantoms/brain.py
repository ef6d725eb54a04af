"""The brain phantom: T1 slices of the MNI152 head, deformed by `brain_scm`.

How much of a patient's growth can be predicted: with all else known, widening E and thinning T are two noisy
readings of the rate r: E = cap(start + v + 0.24 r b), T = 0.021 r b + c, where b is the burden at rate 1. The true
change follows from a curve of area against widening, rendered once with an unwarped head for a few heights of the
slice; the head's size scales both area and change. Warps are left out: they scale a patient's area and its change alike
and are visible in the scan.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ld_common.imaging.modality import Attributes
from ld_simulations.phantoms import brain_scm
from ld_simulations.phantoms.base import Growth, Patient, Phantom, Rendering, ReportTerms, known_attributes
from ld_simulations.phantoms.brain_anatomy import SERIES_Z_MM
from ld_simulations.phantoms.brain_scm import (
    CORTEX_SD,
    RATE_LIMITS,
    RATE_SD,
    SLICE_HEIGHT_LIMIT_MM,
    THINNING_PER_YEAR,
    VENTRICLE_SD_MM,
    WIDENING_HIGHEST_MM,
    WIDENING_LOWEST_MM,
    WIDENING_MM_PER_YEAR,
    WIDENING_START_MM,
    BrainNoise,
    BrainState,
    burden_years,
    capped,
    render_state,
    state_of,
)
from ld_simulations.phantoms.device import Array
from ld_simulations.phantoms.dicom_series import write_series
from ld_simulations.phantoms.rate_posterior import Numbers, Reading, posterior_weights, rate_quantiles
from ld_simulations.phantoms.scanner import ScannerConfig, acquire
from ld_simulations.phantoms.study_metadata import StudyMetadata

MIDDLE_SLICE = len(SERIES_Z_MM) // 2
CURVE_HEIGHTS, CURVE_WIDENINGS = 5, 24
CURVE_SHAPE, CURVE_SPACING_MM = (104, 88), 2.0


class Brain(Phantom[BrainNoise, ScannerConfig]):
    """Axial T1 slices of the bare brain; disease and age widen its ventricles."""

    name = "brain"
    disease = brain_scm.DISEASE
    terms = ReportTerms(
        origin="simulated patients: real anatomy (MNI152), deformed by a known causal model",
        structure="ventricles",
        disease="Alzheimer's disease",
        disease_short="Alzheimer's",
    )
    biomarker = "ventricles"
    device = ScannerConfig
    views, shown_view = len(SERIES_Z_MM), MIDDLE_SLICE

    def draw_noise(self, rng: np.random.Generator) -> BrainNoise:
        """The patient's exogenous noise, by the laws of `brain_scm`."""
        return brain_scm.draw_noise(rng)

    def render(
        self, patient: Patient[BrainNoise], attributes: Attributes, device: ScannerConfig, view: int
    ) -> Rendering:
        """One slice of the series, tissue contrast in [0, 1]."""
        return brain_scm.render(patient, attributes, device.shape, device.spacing_mm, SERIES_Z_MM[view])

    def acquire(
        self, rendering: Rendering, device: ScannerConfig, noise: BrainNoise, rng: np.random.Generator
    ) -> Array:
        """As `scanner.acquire`, with the patient's bias field."""
        return acquire(rendering.contrast, device, noise.bias, rng)

    def write(
        self,
        folder: Path,
        metadata: StudyMetadata,
        pictures: Sequence[Array],
        device: ScannerConfig,
        noise: BrainNoise,
    ) -> None:
        """A series of slices at the patient's own heights."""
        heights = [z_mm + noise.height_mm for z_mm in SERIES_Z_MM]
        write_series(folder, metadata, dict(zip(heights, pictures, strict=True)), device)

    def predict_growth(self, patient: Patient[BrainNoise], attributes: Attributes, target: Attributes) -> Growth:
        """By the curve of area (module docstring), of an unwarped head."""
        noise = patient.noise
        before, after = (_burden(values) for values in (attributes, target))
        raw = WIDENING_START_MM + noise.ventricle_mm + WIDENING_MM_PER_YEAR * noise.rate * before
        thinning = noise.cortex + THINNING_PER_YEAR * noise.rate * before
        rates = _rates()
        readings = (
            Reading(raw - WIDENING_START_MM, WIDENING_MM_PER_YEAR * before, VENTRICLE_SD_MM),
            Reading(thinning, THINNING_PER_YEAR * before, CORTEX_SD),
        )
        weights = posterior_weights(rates, readings)
        further = WIDENING_MM_PER_YEAR * (after - before)
        later = _area(raw + further * np.append(rates, noise.rate), noise.height_mm)
        scale = state_of(noise, attributes).size ** 2
        now = _area(np.array([raw]), noise.height_mm)[0]
        return Growth(scale * (later[-1] - now), scale * (float(np.average(later[:-1], weights=weights)) - now))


def _burden(attributes: Attributes) -> float:
    age, _, diseased = known_attributes(attributes, brain_scm.DISEASE)
    return burden_years(age, diseased, 1.0)


@functools.cache
def _rates() -> Numbers:
    return rate_quantiles(RATE_SD, RATE_LIMITS)


def _area(raw_widening_mm: Numbers, height_mm: float) -> Numbers:
    """Area in mm2 by the curve, for widenings before their cap."""
    widening = (capped(raw_widening_mm) - WIDENING_LOWEST_MM) / (WIDENING_HIGHEST_MM - WIDENING_LOWEST_MM)
    height = (height_mm / SLICE_HEIGHT_LIMIT_MM + 1) / 2 * (CURVE_HEIGHTS - 1)
    below = min(max(math.floor(height), 0), CURVE_HEIGHTS - 2)
    lower, upper = _area_curve()[below : below + 2]
    share = min(max(height - below, 0.0), 1.0)
    return np.interp(widening * (CURVE_WIDENINGS - 1), np.arange(CURVE_WIDENINGS), (1 - share) * lower + share * upper)


@functools.cache
def _area_curve() -> Numbers:
    """Area of an unwarped head's ventricles in mm2, `(heights, widenings)`."""
    plain = np.zeros((1, 3), np.float32)
    areas = np.empty((CURVE_HEIGHTS, CURVE_WIDENINGS))
    heights = np.linspace(-SLICE_HEIGHT_LIMIT_MM, SLICE_HEIGHT_LIMIT_MM, CURVE_HEIGHTS)
    widenings = np.linspace(WIDENING_LOWEST_MM, WIDENING_HIGHEST_MM, CURVE_WIDENINGS)
    for row, height in enumerate(heights):
        noise = BrainNoise(0, 0, 1, 0, plain, plain[0, :1], plain, plain[0], float(height), plain[0], 0)
        for column, widening in enumerate(widenings):
            state = BrainState(1.0, float(widening), 0.0)
            rendering = render_state(noise, state, CURVE_SHAPE, CURVE_SPACING_MM, SERIES_Z_MM[MIDDLE_SLICE])
            areas[row, column] = rendering.area_mm2
    return areas


BRAIN = Brain()
