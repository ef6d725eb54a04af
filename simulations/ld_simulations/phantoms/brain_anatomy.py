"""Real anatomy: the slab of the MNI152 template around the lateral ventricles, as volumes to sample from.

nilearn ships the template (ICBM 2009a, symmetric, brain-extracted: T1 and grey- and white-matter maps at 1 mm; Fonov
et al., NeuroImage 2011). From the two maps follow the rest: cerebrospinal fluid is what of the brain is neither grey
nor white matter, the lateral ventricles are its largest connected part near the centre, and two distances tell how
far a point lies from the ventricles' wall and from the fluid around the cortex.

Points are millimetres in MNI space: x to the patient's right, y to the front, z to the top.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ld_simulations.phantoms.device import Array

CENTRE_Y_MM = -17.0
"""Where the template's brain has its middle from back to front."""

SERIES_Z_MM = (14.0, 22.0, 30.0)
"""Heights of a series' slices; the middle one shows the bodies of both lateral ventricles."""

LOWER_MM, UPPER_MM = (-84.0, -120.0, -8.0), (84.0, 88.0, 56.0)
"""Opposite corners of the slab that is kept: the whole brain across, and all that a warped series can reach."""

DEEP_LOWER_MM, DEEP_UPPER_MM = (-41.0, -61.0, 3.0), (41.0, 37.0, 35.0)
"""Box around the deep fluid spaces; within it the lateral ventricles touch no other fluid."""

FLUID_SHARE = 0.5
SULCAL_SHARE = 0.3
"""Shares of fluid above which a voxel counts as ventricle, or as fluid around the cortex."""

WALL_SMOOTHING_MM = 0.9
EDGE_SMOOTHING_MM = 1.0
"""Gaussian smoothing of the two distances; it rounds off the voxels' corners."""

FAR_MM, FAR_SMOOTHING_MM, MIDWAY = 9.0, 6.0, 0.9
"""From this distance on, the wall's normal is that of a distance smoothed this much: tissue midway between two walls,
where the smoothed gradient is shorter than `MIDWAY`, is then squeezed gradually, and not in a crease."""

REACH_MM = 32.0
"""Distance from the ventricles' wall at which widening no longer moves anything."""
INNER_REACH_MM = 4.0
"""The same, into the ventricles."""

WALL_WIDTH_MM = 1.5
"""Width over which the share of ventricle falls from 1 to 0 at its wall: about what a voxel of a scan averages."""


@dataclass(frozen=True, eq=False)
class Tissue:
    """What the template shows at N points, float32 `(N,)` each."""

    t1: Array
    """T1 contrast, 0 to 1."""
    edge_distance: Array
    """Distance to the brain's outer edge, the walls of the sulci included, mm; 0 in the fluid around the cortex."""
    wall_distance: Array
    """Signed distance to the lateral ventricles' wall, mm; negative inside."""


@dataclass(frozen=True, eq=False)
class Wall:
    """Where N points lie from the lateral ventricles' wall."""

    distance: Array
    """Signed distance `(N,)`, mm; negative inside."""
    normal: Array
    """Direction away from the nearest wall `(3,N)`; shorter than 1 where two walls are equally near."""


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The slab of the template at 1 mm, its first voxel at `LOWER_MM`."""

    brain: NDArray[np.bool_]
    """Voxels `(X,Y,Z)` of the brain."""
    tissue: Array
    """`(X,Y,Z,3)`: T1, distance to the edge, signed distance to the ventricles' wall."""
    wall: Array
    """`(X,Y,Z,4)`: signed distance to the ventricles' wall and its normal."""

    def in_brain(self, points_mm: Array) -> NDArray[np.bool_]:
        """Whether points `(3,...)` lie in the brain, to the nearest voxel."""
        last = np.asarray(self.brain.shape).reshape(3, *[1] * (points_mm.ndim - 1)) - 1
        x, y, z = np.clip(np.rint(_voxels(points_mm)).astype(np.intp), 0, last)
        inside: NDArray[np.bool_] = self.brain[x, y, z]
        return inside

    def tissue_at(self, points_mm: Array) -> Tissue:
        """What lies at points `(3,N)`, by linear interpolation; beyond the slab its border."""
        return Tissue(*_interpolate(self.tissue, points_mm).T)

    def wall_at(self, points_mm: Array) -> Wall:
        """Where points `(3,N)` lie from the wall, by linear interpolation; beyond the slab as at its border."""
        values = _interpolate(self.wall, points_mm).T
        return Wall(values[0], values[1:])


@functools.cache
def load_anatomy() -> Anatomy:
    """Read the template and derive all volumes; a few seconds, once per process."""
    t1, grey, white = _template()
    brain = t1 > 0
    fluid = np.where(brain, 1 - grey - white, 0)
    ventricle, deep = _ventricles(fluid > FLUID_SHARE)
    distance = ndimage.gaussian_filter(_signed_distance(ventricle), WALL_SMOOTHING_MM)
    around = ~brain | ((fluid > SULCAL_SHARE) & ~ndimage.binary_dilation(deep, iterations=3))
    edge = ndimage.gaussian_filter(ndimage.distance_transform_edt(~around), EDGE_SMOOTHING_MM)
    return Anatomy(
        brain=brain,
        tissue=np.stack([t1, edge, distance], axis=-1).astype(np.float32),
        wall=np.stack([distance, *_wall_normal(distance)], axis=-1).astype(np.float32),
    )


def slice_points(shape: tuple[int, int], spacing_mm: float, z_mm: float) -> Array:
    """Points (3,H,W) in mm, x to the right and y to the front, of a slice seen from below, front uppermost."""
    rows, columns = ((np.arange(size, dtype=np.float32) - (size - 1) / 2) * spacing_mm for size in shape)
    y, x = np.meshgrid(CENTRE_Y_MM - rows, -columns, indexing="ij")
    return np.stack([x, y, np.full_like(x, z_mm)]).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Widened:
    """N points of a head whose ventricles widened."""

    points_mm: Array
    """Where in the template they come from, `(3,N)`."""
    wall_distance: Array
    """Signed distance `(N,)` to the wall where it now is, mm."""

    def ventricle(self, tissue: Tissue) -> Array:
        """Share of ventricle `(N,)`, 0 to 1, at points whose origin shows `tissue`.

        The second bound keeps what is tissue in the template, such as the septum, however near two walls come.
        """
        share = np.minimum(0.5 - self.wall_distance / WALL_WIDTH_MM, 1 - 2 * tissue.wall_distance / WALL_WIDTH_MM)
        bounded: Array = np.clip(share, 0, 1).astype(np.float32)
        return bounded


def widened(widening_mm: float, points_mm: Array) -> Widened:
    """What became of template points `(3,N)` once the ventricles' wall moved outward by `widening_mm`.

    The map f(u) = u + widening_mm k(u) of distances takes the wall, u = 0, to `widening_mm`; k falls from 1 at the
    wall to 0 at `REACH_MM` and `INNER_REACH_MM`. It is increasing for widenings between -2.6 and 21 mm.
    """
    # f is increasing, so a table of f(u) against f(u) - u gives d - f^-1(d); beyond the table nothing moves
    before = np.linspace(-INNER_REACH_MM, REACH_MM, 400)
    pushed = widening_mm * _push(before)
    wall = load_anatomy().wall_at(points_mm)
    shift = np.interp(wall.distance, before + pushed, pushed).astype(np.float32)
    return Widened(points_mm - shift * wall.normal, wall.distance - np.float32(widening_mm))


def _push(distance_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """k: the share of the wall's movement at a distance; flat at the wall, so that its edge stays as sharp."""
    share = np.clip(np.where(distance_mm < 0, -distance_mm / INNER_REACH_MM, distance_mm / REACH_MM), 0, 1)
    push: NDArray[np.float64] = 1 - share * share * (3 - 2 * share)
    return push


def _voxels(points_mm: Array) -> Array:
    return points_mm - np.asarray(LOWER_MM, np.float32).reshape(3, *[1] * (points_mm.ndim - 1))


def _interpolate(volume: Array, points_mm: Array) -> Array:
    """Linear interpolation `(N,C)` of `(X,Y,Z,C)`; one pass for all channels, several times as fast as scipy's."""
    _, depth_y, depth_z, channels = volume.shape
    last = np.asarray(volume.shape[:3], np.float32)[:, None] - 1
    at = np.clip(_voxels(points_mm), 0, last - np.float32(1e-3))
    low = at.astype(np.intp)
    share = (at - low).astype(np.float32)
    first = (low[0] * depth_y + low[1]) * depth_z + low[2]
    rows = volume.reshape(-1, channels)
    values = np.zeros((at.shape[1], channels), np.float32)
    for x, y, z in itertools.product((0, 1), repeat=3):
        weight = np.abs(1 - x - share[0]) * np.abs(1 - y - share[1]) * np.abs(1 - z - share[2])
        values += weight[:, None] * rows.take(first + (x * depth_y + y) * depth_z + z, axis=0)
    return values


def _template() -> list[Array]:
    # nilearn takes a second to import: only those who draw hospitals pay for it
    from nilearn import datasets

    volumes = []
    loaders = (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    for load in loaders:
        image = load(resolution=1)
        first = np.round(np.asarray(LOWER_MM) - image.affine[:3, 3]).astype(int)
        last = first + np.round(np.asarray(UPPER_MM) - np.asarray(LOWER_MM)).astype(int) + 1
        box = tuple(slice(start, stop) for start, stop in zip(first, last, strict=True))
        volumes.append(np.asarray(image.dataobj, dtype=np.float32)[box])
    return volumes


def _ventricles(fluid: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The lateral ventricles, and they together with the second largest deep space (around the third ventricle)."""
    inside = np.zeros_like(fluid)
    lower, upper = (np.asarray(corner) - np.asarray(LOWER_MM) for corner in (DEEP_LOWER_MM, DEEP_UPPER_MM))
    box = tuple(slice(int(start), int(stop) + 1) for start, stop in zip(lower, upper, strict=True))
    inside[box] = fluid[box]
    parts, count = ndimage.label(inside)
    sizes = ndimage.sum_labels(inside, parts, range(1, count + 1))
    largest, second = (np.argsort(sizes)[::-1] + 1)[:2]
    return parts == largest, (parts == largest) | (parts == second)


def _signed_distance(inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    # half a voxel: the wall runs between the two voxels, not through either's centre
    outward = np.maximum(ndimage.distance_transform_edt(~inside) - 0.5, 0)
    inward = np.maximum(ndimage.distance_transform_edt(inside) - 0.5, 0)
    signed: NDArray[np.float64] = outward - inward
    return signed


def _wall_normal(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    near = np.asarray(np.gradient(distance))
    far = np.asarray(np.gradient(ndimage.gaussian_filter(distance, FAR_SMOOTHING_MM)))
    far /= np.maximum(np.linalg.norm(far, axis=0), MIDWAY)
    share = np.clip(distance / FAR_MM, 0, 1)
    share = share * share * (3 - 2 * share)
    normal: NDArray[np.float64] = near + share * (far - near)
    return normal
