"""A structural causal model of the frontal chest radiograph: attributes and noise -> a chest, and its counterfactuals.

Exogenous noise U, drawn once per patient and kept under every intervention (`ChestNoise`):

    h ~ N(0, 0.03)    body size             k ~ N(0, 0.04)    the heart as it was in youth
    r ~ LogN(0, 0.25) rate of ageing        a ~ N(0, 0.12)    the aorta as it was in youth
    i ~ N(0, 6) mm    depth of breath       e ~ LogN(0, 0.2)  fluid, and q ~ U(0.25, 0.8) its share on the right
    o ~ LogN(0, 0.25) density that failure adds to the lung
    heart's axis, girth, ribs, clavicles, breasts, stomach's air, vessels, warp, texture, where the patient stands,
    seed of the detector's noise

Endogenous, from sex S, age A in years and heart failure D in {0, 1} (`state_of`):

    ageing      s(A) = 10 log(1 + exp((A - 40) / 10)) years
    size        H = (1.00 if S = M, 0.93 if S = F) + h          of the whole body
    heart       K = (0.90 if S = M, 0.88 if S = F) + k + r (0.004 s(A) + 0.18 D)    linear size, share of the body's
    unfolding   Q = a + 0.02 r s(A)                             of the aorta, with calcium in its arch
    effusion    E = 82 e D (min(1, 2q), min(1, 2(1-q))) mm      height of the fluid at the right and at the left wall
    opacity     O = 0.30 o D                                    of the lung about the hila and at the bases
    descent     V = i - 0.3 (A - 60) - 5 D mm                   of the diaphragm: the lungs' volume
    breast      T = 5 mm if S = M, 15 t mm if S = F

The picture at a point p (`render`), with the lengths of ray in soft tissue and bone from `chest_anatomy`:

    q = p / H + warp(p / H)
    attenuation = 0.019 soft(q; K, Q, E, O, V, T) + 0.035 bone(q; Q)        (Beer and Lambert; per standard mm)

The tube is set to the patient's size, as radiographers do: a larger body does not hold back more of its beam.

Sex acts through H, the heart's 0.02 and T; age through K, Q and V; disease through K, E, O and V. The true
counterfactual of a patient is `render` with other attributes and the same noise. Sizes and rates are of the order
that radiographs show (cardiothoracic ratio 0.45 in health, 0.55 and more in failure) and were set for visibility at
6 mm a pixel, not fitted to any cohort.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ld_common.imaging.modality import Attributes
from ld_simulations.phantoms.base import Rendering, known_attributes
from ld_simulations.phantoms.chest_anatomy import Shape, ray_lengths
from ld_simulations.phantoms.device import Array
from ld_simulations.phantoms.variation import bent, texture_at

SOFT_PER_MM, BONE_PER_MM = 0.019, 0.035
"""Attenuation coefficients of soft tissue and of bone, 1/mm of the standard chest, at some 70 keV."""

BODY_SIZE = {"M": 1.0, "F": 0.93}
BODY_SIZE_SD = 0.03
HEART_SIZE = {"M": 0.90, "F": 0.88}
HEART_SD, AORTA_SD = 0.04, 0.12
RATE_SD, RATE_LIMITS = 0.25, (0.5, 1.8)
HEART_PER_YEAR, HEART_OF_DISEASE = 0.004, 0.18
UNFOLDING_PER_YEAR = 0.02
EFFUSION_MM, EFFUSION_SD, EFFUSION_LIMITS = 82.0, 0.2, (0.6, 1.3)
RIGHT_SHARE = (0.25, 0.8)
OPACITY, OPACITY_SD, OPACITY_LIMITS = 0.30, 0.25, (0.5, 1.7)
BREATH_SD_MM, BREATH_LIMIT_MM = 6.0, 12.0
DESCENT_PER_YEAR_MM, DESCENT_OF_DISEASE_MM = -0.3, -5.0
BREAST_MM, BREAST_SD = {"M": 5.0, "F": 15.0}, 0.3

TILT_SD, TILT_LIMIT = 0.08, 0.24
GIRTH_SD = 0.04
BRANCHES = 12
WARP_WAVES, WARP_MM, WARP_LENGTHS_MM = 8, 1.6, (110.0, 260.0)
STANDING_SD_MM = 4.0
"""How far, across and down, a patient stands from the detector's middle."""
TEXTURE_SIDE, TEXTURE_PIXEL_MM, TEXTURE_SMOOTHING = 96, 3.0, 2.5
DISEASE = "HF"


@dataclass(frozen=True, eq=False)
class ChestNoise:
    """One patient's exogenous noise U."""

    size: float
    heart: float
    rate: float
    aorta: float
    breath_mm: float
    effusion: float
    right_share: float
    opacity: float
    breast: float
    tilt: float
    """Of the heart's axis, radians."""
    girth: float
    rib_phase: float
    rib_drop_mm: float
    clavicle_mm: float
    stomach_mm: tuple[float, float]
    vessels: Array
    """As in `Shape`."""
    warp_waves: Array
    """Wave vectors (W,2) in radians per mm."""
    warp_phases: Array
    """(W,) radians."""
    warp_mm: Array
    """Amplitudes (W,2)."""
    texture_mm: Array
    """Where in the common texture the patient lies, (2,)."""
    standing_mm: Array
    """Where the patient stands, (2,): to the left of the detector's middle and below it."""
    scanner_seed: int
    """Seed of the detector's noise; visits derive theirs from it."""


@dataclass(frozen=True)
class ChestState:
    """The endogenous variables that a picture depends on."""

    size: float
    heart: float
    unfolding: float
    effusion_mm: tuple[float, float]
    """At the right and at the left wall."""
    opacity: float
    descent_mm: float
    breast_mm: float


def draw_noise(rng: np.random.Generator) -> ChestNoise:
    """Draw one patient's exogenous noise."""
    directions = rng.standard_normal((WARP_WAVES, 2))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    lengths = rng.uniform(*WARP_LENGTHS_MM, (WARP_WAVES, 1))
    amplitude = WARP_MM * math.sqrt(2 / WARP_WAVES)
    angles = np.linspace(-1.5, 1.45, BRANCHES) + 0.12 * rng.standard_normal((2, BRANCHES))
    curvatures = 0.005 * rng.standard_normal((2, BRANCHES))
    return ChestNoise(
        size=BODY_SIZE_SD * rng.standard_normal(),
        heart=HEART_SD * rng.standard_normal(),
        rate=_log_normal(rng, RATE_SD, RATE_LIMITS),
        aorta=AORTA_SD * rng.standard_normal(),
        breath_mm=float(np.clip(BREATH_SD_MM * rng.standard_normal(), -BREATH_LIMIT_MM, BREATH_LIMIT_MM)),
        effusion=_log_normal(rng, EFFUSION_SD, EFFUSION_LIMITS),
        right_share=rng.uniform(*RIGHT_SHARE),
        opacity=_log_normal(rng, OPACITY_SD, OPACITY_LIMITS),
        breast=_log_normal(rng, BREAST_SD, (0.4, 1.6)),
        tilt=float(np.clip(TILT_SD * rng.standard_normal(), -TILT_LIMIT, TILT_LIMIT)),
        girth=1 + GIRTH_SD * rng.standard_normal(),
        rib_phase=rng.uniform(0.2, 0.9),
        rib_drop_mm=rng.normal(48, 5),
        clavicle_mm=rng.normal(0, 5),
        stomach_mm=(rng.uniform(12, 34), rng.uniform(6, 14)),
        vessels=np.stack([angles, curvatures], axis=-1).astype(np.float32),
        warp_waves=(2 * np.pi / lengths * directions).astype(np.float32),
        warp_phases=rng.uniform(0, 2 * np.pi, WARP_WAVES).astype(np.float32),
        # long waves move more than short ones: the same bend everywhere, and no fold
        warp_mm=(amplitude * lengths / np.mean(lengths) * rng.standard_normal((WARP_WAVES, 2))).astype(np.float32),
        texture_mm=rng.uniform(0, TEXTURE_SIDE * TEXTURE_PIXEL_MM, 2).astype(np.float32),
        standing_mm=(STANDING_SD_MM * rng.standard_normal(2)).astype(np.float32),
        scanner_seed=int(rng.integers(2**63)),
    )


def _log_normal(rng: np.random.Generator, sd: float, limits: tuple[float, float]) -> float:
    return float(np.clip(np.exp(sd * rng.standard_normal()), *limits))


def ageing_years(age_years: float) -> float:
    """s(A): years of ageing that have acted at an age."""
    return 10 * math.log1p(math.exp((age_years - 40) / 10))


def state_of(noise: ChestNoise, attributes: Attributes) -> ChestState:
    """The endogenous variables of `noise` under `attributes` (age, sex, diagnosis).

    Raises:
        RequestError: an attribute is missing or has a value the model does not know.
    """
    age, sex, diseased = known_attributes(attributes, DISEASE)
    fluid = EFFUSION_MM * noise.effusion * diseased
    return ChestState(
        size=BODY_SIZE[sex] + noise.size,
        heart=HEART_SIZE[sex] + noise.heart + noise.rate * heart_burden(age, diseased),
        unfolding=noise.aorta + noise.rate * UNFOLDING_PER_YEAR * ageing_years(age),
        effusion_mm=(fluid * min(1, 2 * noise.right_share), fluid * min(1, 2 * (1 - noise.right_share))),
        opacity=OPACITY * noise.opacity * diseased,
        descent_mm=noise.breath_mm + DESCENT_PER_YEAR_MM * (age - 60) + DESCENT_OF_DISEASE_MM * diseased,
        breast_mm=BREAST_MM[sex] * (noise.breast if sex == "F" else 1),
    )


def heart_burden(age_years: float, diseased: bool) -> float:
    """Growth of the heart's linear size at rate 1."""
    return HEART_PER_YEAR * ageing_years(age_years) + HEART_OF_DISEASE * diseased


def shape_of(noise: ChestNoise, state: ChestState) -> Shape:
    """The chest that `noise` and `state` cause, before its size and warp."""
    return Shape(
        heart=state.heart,
        tilt=noise.tilt,
        effusion_mm=state.effusion_mm,
        opacity=state.opacity,
        descent_mm=state.descent_mm,
        unfolding=state.unfolding,
        breast_mm=state.breast_mm,
        girth=noise.girth,
        rib_phase=noise.rib_phase,
        rib_drop_mm=noise.rib_drop_mm,
        clavicle_mm=noise.clavicle_mm,
        stomach_mm=noise.stomach_mm,
        vessels=noise.vessels,
    )


def render_state(noise: ChestNoise, state: ChestState, grid: tuple[int, int], spacing_mm: float) -> Rendering:
    """Attenuation (H,W) on a grid of pixels, and the heart's silhouette."""
    at = warped(noise, state.size, grid_points(grid, spacing_mm))
    shape = shape_of(noise, state)
    lengths = ray_lengths(shape, at[0], at[1], _texture(at + noise.texture_mm[:, None, None]))
    attenuation = SOFT_PER_MM * lengths.soft + BONE_PER_MM * lengths.bone
    return Rendering(attenuation.astype(np.float32), silhouette(lengths.heart), spacing_mm)


def grid_points(grid: tuple[int, int], spacing_mm: float) -> Array:
    """Points (2,H,W) in mm, to the patient's left and downward, from the detector's middle."""
    down, left = ((np.arange(size, dtype=np.float32) - (size - 1) / 2) * spacing_mm for size in grid)
    v, u = np.meshgrid(down, left, indexing="ij")
    return np.stack([u, v]).astype(np.float32)


def warped(noise: ChestNoise, size: float, points_mm: Array) -> Array:
    """Where in the standard chest (2,...) points (2,...) of the picture come from."""
    at = (points_mm - noise.standing_mm[:, None, None]) / np.float32(size)
    return bent(at, noise.warp_waves, noise.warp_phases, noise.warp_mm)


def silhouette(radius: Array) -> Array:
    """Share of heart (H,W) in each pixel, from distances that are 1 at its edge."""
    slope = np.hypot(*np.gradient(radius))
    share: Array = np.clip(0.5 + (1 - radius) / np.maximum(slope, 1e-6), 0, 1).astype(np.float32)
    return share


def _texture(points_mm: Array) -> Array:
    return texture_at(points_mm / TEXTURE_PIXEL_MM, TEXTURE_SIDE, TEXTURE_SMOOTHING)
