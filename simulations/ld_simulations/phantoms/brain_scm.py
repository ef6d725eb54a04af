"""The demo's structural causal model: a patient's attributes and noise -> a brain whose true counterfactuals are known.

Exogenous noise U, drawn once per patient and kept under every intervention (`BrainNoise`):

    h ~ N(0, 0.015)   head size              v ~ N(0, 0.75) mm   ventricles as they were in youth
    r ~ LogN(0, 0.22) rate of ageing         c ~ N(0, 0.10)     cortex as it was in youth
    warp, texture, height of the slices, the scanner's bias field, seed of the scanner's noise

Endogenous, from sex S, age A in years and Alzheimer's disease D in {0, 1} (`state_of`):

    size      H = (1.00 if S = M, 0.95 if S = F) + h
    burden    B = r (s(A) + D g(A)),   s(A) = 10 log(1 + exp((A - 60) / 10)),   g(A) = 9 + 0.12 max(A - 60, 0) years
    widening  E = cap(-0.5 + v + 0.24 B) mm:  the ventricles' wall moves outward by E;  cap keeps it in (-1.6, 11.5)
    thinning  T = 0.021 B + c:  the level of T1 below which cortex has become fluid rises with T

The picture at a point p of the patient's head (`render`), with d and n the wall's distance and normal:

    q = p / H + warp(p / H)              to the template's space
    x = q - (d(q) - f^-1(d(q))) n(q)     f(u) = u + E k(u):  u = 0, the wall, comes to lie at d = E;  k(0) = 1, k -> 0
    contrast = tone(T1(x); T, d_edge(x)) (1 + texture(x)), fluid where d(q) < E

Sex acts on size alone; age and disease act through B alone. The true counterfactual of a patient is `render` with
other attributes and the same `BrainNoise`. Sizes and rates are of the order that cohorts report and were set for
visibility at 3 mm a pixel, not fitted to any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ld_common.imaging.modality import Attributes
from ld_simulations.phantoms.base import Patient, Rendering, known_attributes
from ld_simulations.phantoms.brain_anatomy import CENTRE_Y_MM, Tissue, load_anatomy, slice_points, widened
from ld_simulations.phantoms.device import Array
from ld_simulations.phantoms.variation import bent, texture_at

DISEASE = "AD"
HEAD_SIZE = {"M": 1.0, "F": 0.95}
HEAD_SIZE_SD = 0.015
VENTRICLE_SD_MM = 0.75
RATE_SD = 0.22
RATE_LIMITS = (0.55, 1.65)
CORTEX_SD = 0.10
SLICE_HEIGHT_LIMIT_MM = 2.0

WIDENING_START_MM = -0.5
WIDENING_MM_PER_YEAR = 0.24
WIDENING_LOWEST_MM, WIDENING_KNEE_MM, WIDENING_HIGHEST_MM = -1.6, 6.0, 11.5
"""The widening's limits, and where it begins to bend towards the upper one."""

THINNING_PER_YEAR = 0.021
CORTEX_DEPTH_MM = (5.0, 11.0)
"""Distances from the brain's edge between which thinning fades out."""
FLUID_T1, WHITE_T1 = 0.22, 0.87
"""Template T1 of ventricular fluid and of white matter."""
PIAL_T1, PIAL_T1_PER_THINNING, PIAL_SOFTNESS = 0.42, 0.21, 0.035
"""T1 below which cortex is drawn as fluid: without thinning, its rise per unit of thinning, the step's softness."""
FLUID_LEVEL, WHITE_LEVEL = 0.1, 0.86
"""Tissue contrast of fluid and white matter in a `Rendering`."""

WARP_WAVES = 10
WARP_MM = 2.0
"""Root mean square displacement of a patient's anatomy along each axis."""
WARP_LENGTHS_MM = (70.0, 190.0)
TEXTURE_SIDE, TEXTURE_VOXEL_MM, TEXTURE_SMOOTHING = 48, 2.0, 0.9
TEXTURE_CONTRAST, TEXTURE_OF_PIAL_T1 = 0.018, 0.02
BIAS_TERMS = 5


@dataclass(frozen=True, eq=False)
class BrainNoise:
    """One patient's exogenous noise U."""

    head: float
    ventricle_mm: float
    rate: float
    cortex: float
    warp_waves: Array
    """Wave vectors (W,3) in radians per mm."""
    warp_phases: Array
    """(W,) radians."""
    warp_mm: Array
    """Amplitudes (W,3)."""
    texture_mm: Array
    """Where in the common texture the patient's head lies, (3,)."""
    height_mm: float
    """How far the patient's slices lie above the standard ones."""
    bias: Array
    """The scanner's bias field at this patient, as coefficients (BIAS_TERMS,) of unit deviation."""
    scanner_seed: int
    """Seed of the scanner's noise; visits and slices derive theirs from it."""


@dataclass(frozen=True)
class BrainState:
    """The endogenous variables that a picture depends on."""

    size: float
    widening_mm: float
    thinning: float


def draw_noise(rng: np.random.Generator) -> BrainNoise:
    """Draw one patient's exogenous noise."""
    directions = rng.standard_normal((WARP_WAVES, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    lengths = rng.uniform(*WARP_LENGTHS_MM, (WARP_WAVES, 1))
    amplitude = WARP_MM * math.sqrt(2 / WARP_WAVES)
    return BrainNoise(
        head=HEAD_SIZE_SD * rng.standard_normal(),
        ventricle_mm=VENTRICLE_SD_MM * rng.standard_normal(),
        rate=float(np.clip(np.exp(RATE_SD * rng.standard_normal()), *RATE_LIMITS)),
        cortex=CORTEX_SD * rng.standard_normal(),
        warp_waves=(2 * np.pi / lengths * directions).astype(np.float32),
        warp_phases=rng.uniform(0, 2 * np.pi, WARP_WAVES).astype(np.float32),
        # long waves move more than short ones: the same bend everywhere, and no fold
        warp_mm=(amplitude * lengths / np.mean(lengths) * rng.standard_normal((WARP_WAVES, 3))).astype(np.float32),
        texture_mm=rng.uniform(0, TEXTURE_SIDE * TEXTURE_VOXEL_MM, 3).astype(np.float32),
        height_mm=rng.uniform(-SLICE_HEIGHT_LIMIT_MM, SLICE_HEIGHT_LIMIT_MM),
        bias=rng.standard_normal(BIAS_TERMS).astype(np.float32),
        scanner_seed=int(rng.integers(2**63)),
    )


def burden_years(age_years: float, diseased: bool, rate: float) -> float:
    """Years of ageing, B, that have acted on the brain at an age, with the disease or without."""
    ageing = 10 * math.log1p(math.exp((age_years - 60) / 10))
    disease = 9 + 0.12 * max(age_years - 60, 0) if diseased else 0.0
    return rate * (ageing + disease)


def capped(widening_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cap of E: itself between 0 and the knee, bent towards its limits beyond; strictly increasing."""
    room = WIDENING_HIGHEST_MM - WIDENING_KNEE_MM
    above = WIDENING_KNEE_MM + room * np.tanh((widening_mm - WIDENING_KNEE_MM) / room)
    below = WIDENING_LOWEST_MM * np.tanh(widening_mm / WIDENING_LOWEST_MM)
    return np.where(widening_mm > WIDENING_KNEE_MM, above, np.where(widening_mm < 0, below, widening_mm))


def state_of(noise: BrainNoise, attributes: Attributes) -> BrainState:
    """The endogenous variables of `noise` under `attributes` (age, sex, diagnosis).

    Raises:
        RequestError: an attribute is missing or has a value the model does not know.
    """
    age, sex, diseased = known_attributes(attributes, DISEASE)
    burden = burden_years(age, diseased, noise.rate)
    widening = np.array(WIDENING_START_MM + noise.ventricle_mm + WIDENING_MM_PER_YEAR * burden)
    return BrainState(
        size=HEAD_SIZE[sex] + noise.head,
        widening_mm=float(capped(widening)),
        thinning=THINNING_PER_YEAR * burden + noise.cortex,
    )


def render(
    patient: Patient[BrainNoise], attributes: Attributes, shape: tuple[int, int], spacing_mm: float, z_mm: float
) -> Rendering:
    """The axial slice at height `z_mm`, centred on the head, of `patient` had `attributes` been theirs.

    Raises:
        RequestError: as `state_of` does.
    """
    return render_state(patient.noise, state_of(patient.noise, attributes), shape, spacing_mm, z_mm)


def render_state(
    noise: BrainNoise, state: BrainState, shape: tuple[int, int], spacing_mm: float, z_mm: float
) -> Rendering:
    """The slice of `shape` (H,W) that `noise` and `state` cause."""
    anatomy = load_anatomy()
    points = warped(noise, state.size, slice_points(shape, spacing_mm, z_mm + noise.height_mm))
    # widening ends before the brain does, so what lies outside can be left out
    inside = anatomy.in_brain(points)
    head = widened(state.widening_mm, points[:, inside])
    tissue = anatomy.tissue_at(head.points_mm)
    contrast, ventricle = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    ventricle[inside] = head.ventricle(tissue)
    contrast[inside] = _tone(tissue, ventricle[inside], head.points_mm + noise.texture_mm[:, None], state.thinning)
    return Rendering(contrast, ventricle, spacing_mm)


def warped(noise: BrainNoise, size: float, points_mm: Array) -> Array:
    """Where in the template (3,...) a slice's points (3,...) come from by the head's size and shape alone."""
    pivot = np.array([0.0, CENTRE_Y_MM, points_mm[2].flat[0]], np.float32).reshape(3, *[1] * (points_mm.ndim - 1))
    at = (points_mm - pivot) / np.float32(size) + pivot
    return bent(at, noise.warp_waves, noise.warp_phases, noise.warp_mm)


def _tone(tissue: Tissue, ventricle: Array, texture_mm: Array, thinning: float) -> Array:
    """Tissue contrast (N,) of N points: near the brain's edge, T1 below the pial level becomes fluid's."""
    fine, coarse = _texture(texture_mm), _texture(texture_mm / np.float32(4))
    start, end = CORTEX_DEPTH_MM
    depth = np.clip((tissue.edge_distance - start) / (end - start), 0, 1)
    pial = PIAL_T1 + PIAL_T1_PER_THINNING * thinning + TEXTURE_OF_PIAL_T1 * coarse
    remaining = 1 / (1 + np.exp((pial - tissue.t1) / PIAL_SOFTNESS))
    remaining = (remaining + depth * (1 - remaining)) * (1 - ventricle)
    t1 = tissue.t1 - FLUID_T1
    level = FLUID_LEVEL + np.where(t1 > 0, t1 * remaining, t1) * (WHITE_LEVEL - FLUID_LEVEL) / (WHITE_T1 - FLUID_T1)
    tone: Array = np.clip(level * (1 + TEXTURE_CONTRAST * fine), 0, 1).astype(np.float32)
    return tone


def _texture(points_mm: Array) -> Array:
    return texture_at(points_mm / TEXTURE_VOXEL_MM, TEXTURE_SIDE, TEXTURE_SMOOTHING)
