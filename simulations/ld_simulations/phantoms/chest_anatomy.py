"""A standard chest as lengths that each X-ray passes through soft tissue, bone and lung, seen from the front.

Rays run straight from back to front. A point of the picture is (u, v) in millimetres: u to the patient's left, which is
the picture's right, v downward, both from the middle of the picture. Every structure is an analytic shape, so that a
length along the ray follows from (u, v) in closed form: ellipsoids (heart, breasts, stomach's air), tubes (ribs,
clavicles, spine, vessels, trachea) and domes (diaphragm, effusion). Air is what of the thoracic cavity nothing fills.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

CAVITY_HALF_WIDTH_MM, CAVITY_WIDEST_MM, CAVITY_TOP_MM = 138.0, 62.0, -150.0
"""The cavity's inner half width at its widest, the v of that place, and the v of the lungs' upper end."""
CAVITY_HALF_DEPTH_MM = 84.0
BODY_HALF_DEPTH_MM = 112.0
FLOOR_MM = 132.0
"""The v of the costophrenic angles at standard inspiration."""
HEART_CENTRE_MM = (20.0, 44.0)
HEART_AXES_MM, HEART_DEPTH_MM = (69.0, 53.0), 58.0
"""Half axes of the heart's silhouette, along the apex and across, and its half depth."""
ATRIUM_OFFSET_MM, ATRIUM_AXES_MM = (-33.0, 0.0), (31.0, 46.0)
"""The right atrium's middle from the heart's, and its half axes."""
HEART_TILT = 0.62
"""Angle of the heart's axis below the horizontal, radians."""
DOME_CENTRES_MM, DOME_TOPS_MM = (-73.0, 79.0), (82.0, 95.0)
"""Right and left dome of the diaphragm: the right one stands higher."""
DOME_HALF_WIDTHS_MM, DOME_HEIGHT_MM = (105.0, 74.0), 66.0
"""Half widths towards the heart and towards the wall."""
DOME_FILLED_MM, FLUID_FILLED_MM = 55.0, 12.0
"""Distance below the edge of a dome, or of fluid, at which no air is left before or behind it."""
MENISCUS_MM, MENISCUS_LEVEL = 26.0, 0.55
"""How far from the wall fluid still climbs, and the height that it has beyond, as a share of that at the wall."""
RIB_PITCH_MM, RIB_RADIUS_MM, RIB_COUNT = 24.0, 6.0, 10
HILA_MM = (-40.0, 44.0, -8.0)
"""The u of the right and of the left hilum, and the v of both."""
KNOB_MM, KNOB_RADIUS_MM = (15.0, -72.0), 24.0
"""Middle and radius of the aortic arch, seen end on."""
LUNG_DENSITY = 0.24
"""Of healthy lung, as a share of soft tissue's."""


@dataclass(frozen=True, eq=False)
class Shape:
    """What one chest has of the standard one's shape, disease and age included; sizes are shares of the standard."""

    heart: float
    """Linear size of the heart."""
    tilt: float
    """Turn of the heart's axis away from the standard one, radians."""
    effusion_mm: tuple[float, float]
    """Height of the fluid at the right and at the left wall."""
    opacity: float
    """Density that the lung has gained at the hila and the bases, share of soft tissue's."""
    descent_mm: float
    """How far the diaphragm stands below the standard one."""
    unfolding: float
    """How far the aorta has unfolded and calcified; 0 in youth."""
    breast_mm: float
    """Thickness of a breast."""
    girth: float
    """Share of the standard thickness of the body."""
    rib_phase: float
    """Ribs are shifted downward by this share of their pitch."""
    rib_drop_mm: float
    """How far a rib falls from the spine to the wall."""
    clavicle_mm: float
    """How far the clavicles stand below the standard ones."""
    stomach_mm: tuple[float, float]
    """Half width and half height of the stomach's air."""
    vessels: Array
    """`(2,J,2)`: for each lung and branch its angle from the hilum and its curvature per mm."""


@dataclass(frozen=True, eq=False)
class Lengths:
    """What each ray passes through, mm, `(H,W)` each."""

    soft: Array
    """Soft tissue and what of lung is as dense as it."""
    bone: Array
    heart: Array
    """Distance from the heart's middle as a share of that of its edge; the silhouette ends at 1."""


def ray_lengths(shape: Shape, u: Array, v: Array, texture: Array) -> Lengths:
    """Lengths at points `(H,W)` of the standard chest; `texture` is smooth noise of unit deviation at each."""
    body = _body(shape, u, v)
    cavity = np.minimum(_cavity(u, v), body)
    heart = heart_radius(shape, u, v)
    filled = np.maximum(_mediastinum(shape, u, v), 2 * HEART_DEPTH_MM * shape.heart * _arc(heart**2))
    # the lungs end at the spine
    beside = np.clip(cavity - filled, 0, None) * _step((np.abs(u) - 2) / 14)
    air = beside * (1 - np.maximum(_dome(shape, u, v), effusion_share(shape, u, v)))
    vessels = np.minimum(1.6 * _vessels(shape, u, v), 0.6 * air)
    density = LUNG_DENSITY + 0.02 * texture + opacity_at(shape, u, v, texture)
    airways = _trachea(u, v) * (cavity > 0) + _stomach_air(shape, u, v)
    soft = body - air * (1 - np.clip(density, 0, 0.95)) + vessels - airways + _breasts(shape, u, v) * (body > 0)
    return Lengths(np.clip(soft, 0, None), _bone(shape, u, v) * (body > 0), heart)


def heart_radius(shape: Shape, u: Array, v: Array) -> Array:
    """Distance from the heart's middle as a share of that of its edge: ventricles and right atrium, two ellipsoids."""
    size = np.float32(shape.heart)
    # a heart that grows does so to the left and stays on the diaphragm, which also carries it up and down
    x = u - (HEART_CENTRE_MM[0] + 34 * (size - 1))
    y = v - (HEART_CENTRE_MM[1] - 18 * (size - 1) + 0.6 * shape.descent_mm)
    angle = HEART_TILT + shape.tilt
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    ventricles = (along / HEART_AXES_MM[0]) ** 2 + (across / HEART_AXES_MM[1]) ** 2
    right, down = x - ATRIUM_OFFSET_MM[0] * size, y - ATRIUM_OFFSET_MM[1] * size
    atrium = (right / ATRIUM_AXES_MM[0]) ** 2 + (down / ATRIUM_AXES_MM[1]) ** 2
    return np.sqrt(np.minimum(ventricles, atrium)) / size


def opacity_at(shape: Shape, u: Array, v: Array, texture: Array) -> Array:
    """Density gained by the lung: a butterfly about the hila, and the bases; patchy."""
    side = np.where(u < 0, HILA_MM[0], HILA_MM[1]) * 1.25
    hilar = np.exp(-(((u - side) / 36) ** 2) - ((v - HILA_MM[2] - 8) / 48) ** 2)
    basal = np.exp(-np.square(np.minimum(v - 88 - shape.descent_mm, 0) / 40))
    return shape.opacity * np.clip((0.8 * hilar + 0.55 * basal) * (1 + 0.35 * texture), 0, None)


def effusion_share(shape: Shape, u: Array, v: Array) -> Array:
    """Share of the cavity's depth that fluid fills, `(H,W)`; its surface climbs along the wall."""
    height = np.where(u < 0, *shape.effusion_mm)
    wall = np.clip(cavity_half_width(v) - np.abs(u), 0, None)
    climb = MENISCUS_LEVEL + (1 - MENISCUS_LEVEL) * np.exp(-wall / MENISCUS_MM)
    below = v - (FLOOR_MM + shape.descent_mm - height * climb)
    return np.where(height > 0, _rise(below / FLUID_FILLED_MM), 0)


def cavity_half_width(v: Array) -> Array:
    """Inner half width of the thorax at each height; 0 above the lungs."""
    share = np.clip((CAVITY_WIDEST_MM - v) / (CAVITY_WIDEST_MM - CAVITY_TOP_MM), 0, 1)
    return CAVITY_HALF_WIDTH_MM * (1 - share**2.4) ** (1 / 2.4)


def _body(shape: Shape, u: Array, v: Array) -> Array:
    across = np.abs(u)
    # below the armpits the body ends at the flank; above them the shoulder runs out of the picture
    half_width = 160 + 6 * shape.girth + 130 / (1 + np.exp((v + 50) / 13))
    shoulder = v + 190 - 46 * _step((across - 50) / 110) + 80 * _step((62 - across) / 26)
    below_top = _rise(shoulder / 70)
    depth = 2 * BODY_HALF_DEPTH_MM * shape.girth * (0.72 + 0.28 * _rise((v + 180) / 150))
    return depth * below_top * np.clip(1 - (across / half_width) ** 2.6, 0, None) ** (1 / 2.6)


def _cavity(u: Array, v: Array) -> Array:
    width = cavity_half_width(v)
    return 2 * CAVITY_HALF_DEPTH_MM * (width / CAVITY_HALF_WIDTH_MM) ** 0.7 * _arc((u / np.maximum(width, 1e-3)) ** 2)


def _mediastinum(shape: Shape, u: Array, v: Array) -> Array:
    right = 24 + 7 * np.exp(-(((v + 45) / 38) ** 2)) + 5 * shape.unfolding
    left = 24 + 10 * np.exp(-(((v + 26) / 17) ** 2))
    slab = 128 * np.clip(1 - np.abs(u / np.where(u < 0, right, left)) ** 2.5, 0, None) ** (1 / 2.5)
    x = u - KNOB_MM[0] - 7 * shape.unfolding
    knob = 2 * 38 * _arc((x**2 + (v - KNOB_MM[1]) ** 2) / (KNOB_RADIUS_MM + 4 * shape.unfolding) ** 2)
    # the descending aorta's left border, seen through the heart
    descending = 60 * _arc(((u - 20 - 9 * shape.unfolding) / 14) ** 2) * (v > KNOB_MM[1])
    hila = np.where(u < 0, HILA_MM[0], HILA_MM[1])
    hilum = 30 * np.clip(1 - ((u - hila * 0.85) / 20) ** 2 - ((v - HILA_MM[2]) / 26) ** 2, 0, None)
    return np.maximum(np.maximum(slab, knob), np.maximum(descending, hilum))


def _dome(shape: Shape, u: Array, v: Array) -> Array:
    """Share of the cavity's depth that lies behind or before the diaphragm, liver and stomach below it."""
    edges = []
    for centre, top in zip(DOME_CENTRES_MM, DOME_TOPS_MM, strict=True):
        half_width = np.where(np.abs(u) < abs(centre), *DOME_HALF_WIDTHS_MM)
        edges.append(top + shape.descent_mm + DOME_HEIGHT_MM * (1 - _arc(((u - centre) / half_width) ** 2)))
    return _rise((v - np.minimum(*edges)) / DOME_FILLED_MM)


def _bone(shape: Shape, u: Array, v: Array) -> Array:
    across = np.abs(u)
    width = np.maximum(cavity_half_width(v), 1e-3)
    x = across / width
    inside = x < 1
    # ribs meet the ray ever more along their length towards the wall
    oblique = 1 / np.sqrt(np.clip(1 - x**2, 0.12, None))
    first = CAVITY_TOP_MM + RIB_PITCH_MM * shape.rib_phase
    back = _ribs(v - first + 8 * np.sin(2.4 * x) - shape.rib_drop_mm * x**2.2, 1.0) * inside
    front = _ribs(v - first - 32 - shape.rib_drop_mm - 62 * (1 - x), 0.9) * inside * _step((x - 0.5) / 0.06)
    ribs = (6.5 * back + 4.0 * front) * np.minimum(oblique, 2.4) * (across > 14)
    clavicle_v = -122 + shape.clavicle_mm - 0.20 * across + 7 * np.sin((across - 15) / 40)
    clavicle = 17 * _arc(((v - clavicle_v) / 6.5) ** 2) * (across > 16) * _step((172 - across) / 10)
    blade = (across - 150 - 0.12 * (v + 60)) / 40, (v + 62) / 66
    scapula = 4.5 * _step((1 - blade[0] ** 2 - blade[1] ** 2) / 0.12)
    vertebrae = 0.72 + 0.28 * np.cos(2 * np.pi * v / 25)
    spine = 6 * _arc((u / 19) ** 2) * vertebrae
    # calcium shows as a thin ring about the arch
    ring = np.hypot(u - KNOB_MM[0] - 7 * shape.unfolding, v - KNOB_MM[1]) - KNOB_RADIUS_MM - 4 * shape.unfolding + 2.5
    calcium = 4 * max(shape.unfolding, 0.0) * np.exp(-((ring / 2) ** 2)) * (u > KNOB_MM[0])
    return ribs + clavicle + scapula + spine + calcium


def _ribs(below_mm: Array, thickness: float) -> Array:
    """Profile, 0 to 1, of ribs at every pitch below the first."""
    number = np.rint(below_mm / RIB_PITCH_MM)
    away = (below_mm - number * RIB_PITCH_MM) / (RIB_RADIUS_MM * thickness)
    # cortex: the edges of a tube are as bright as its middle
    return np.sqrt(_arc(away**2)) * ((number >= 0) & (number < RIB_COUNT))


def _vessels(shape: Shape, u: Array, v: Array) -> Array:
    total = np.zeros_like(u)
    for side, hilum, branches in zip((u < 0, u >= 0), HILA_MM[:2], shape.vessels, strict=True):
        total[side] = _branches(np.abs(u[side]) - abs(hilum), v[side] - HILA_MM[2], branches)
    return total


def _branches(x: Array, y: Array, branches: Array) -> Array:
    """Length of vessel at points `(N,)` from the hilum, x outward: tubes that taper as they leave it."""
    distance = np.hypot(x, y)
    angle = np.arctan2(y, x)
    radius = np.clip(5.0 * np.exp(-distance / 60), 1.0, None)
    turned = branches[:, :1] + branches[:, 1:] * distance
    away = distance * np.sin(angle - turned) / radius
    tubes = np.where(np.cos(angle - turned) > 0, np.sqrt(np.clip(1 - away**2, 0, None)), 0)
    # none at the hilum itself, where all begin, and none at the pleura
    shown = np.exp(-np.square(distance / 130)) * (1 - np.exp(-np.square(distance / 15)))
    return 2 * radius * tubes.sum(0) * shown


def _trachea(u: Array, v: Array) -> Array:
    tube = 24 * _arc((u / 8.5) ** 2) * _step((-58 - v) / 8)
    below = np.clip(v + 62, 0, None)
    bronchi = 10 * _arc(((np.abs(u) - 1.1 * below) / 7) ** 2) * (below > 0) * _step((40 - below) / 10)
    return np.maximum(tube, bronchi)


def _stomach_air(shape: Shape, u: Array, v: Array) -> Array:
    half_width, half_height = shape.stomach_mm
    top = DOME_TOPS_MM[1] + shape.descent_mm + 9 + half_height
    return 50 * _arc(((u - 74) / half_width) ** 2 + ((v - top) / half_height) ** 2)


def _breasts(shape: Shape, u: Array, v: Array) -> Array:
    x, y = (np.abs(u) - 80) / 64, (v - 52) / 56
    # fuller below: the lower edge is the one that shows
    return shape.breast_mm * _arc(x**2 + y**2) * (0.55 + 0.45 * _rise((y + 1) / 1.8))


def _arc(square: Array) -> Array:
    """sqrt(1 - s) of a squared distance: an ellipsoid's length, 0 outside."""
    return np.sqrt(np.clip(1 - square, 0, None))


def _rise(share: Array) -> Array:
    """A quarter of an ellipse: 0 up to 0, steep just after it, 1 from 1 on."""
    return _arc((1 - np.clip(share, 0, 1)) ** 2)


def _step(share: Array) -> Array:
    """A ramp from 0 to 1, smooth at both ends."""
    ramp = np.clip(share, 0, 1)
    return ramp * ramp * (3 - 2 * ramp)
