"""Real anatomy: the slab of the MNI152 template around the lateral ventricles, as volumes to sample from.

nilearn ships the template (ICBM 2009a, symmetric, brain-extracted: T1 and grey- and white-matter maps at 1 mm; Fonov
et al., NeuroImage 2011). From the two maps follow the rest: cerebrospinal fluid is what of the brain is neither grey nor white
matter, the lateral ventricles are its largest connected part near the centre, and two distances tell how far a
point lies from the ventricles' wall and from the fluid around the cortex.

Points are millimetres in MNI space: x to the patient's right, y to the front, z to the top.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float32]

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

WALL_WIDTH_MM = 1.5
"""Width of the wall's ramp from 0 to 1 in `Anatomy.ventricle`: about what a voxel of a scan averages."""


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Volumes `(X, Y, Z)`, float32, 1 mm, whose first voxel lies at `LOWER_MM`."""

    t1: Array
    """T1 contrast, 0 outside the brain to 1."""
    grey: Array
    white: Array
    fluid: Array
    """Shares of the three tissues, 0 to 1; they add up to 1 inside the brain."""
    brain: Array
    """1 inside the brain, else 0."""
    ventricle: Array
    """Share of lateral ventricle, 0 to 1."""
    wall_distance: Array
    """Smoothed signed distance to the lateral ventricles' wall, mm; negative inside them."""
    wall_normal: tuple[Array, Array, Array]
    """Gradient of `wall_distance`: length about 1, less where two walls are equally near."""
    edge_distance: Array
    """Distance to the brain's outer edge, the walls of the sulci included, mm; 0 in the fluid around the cortex."""


def sample(volume: Array, points_mm: Array) -> Array:
    """Linear interpolation of one of `Anatomy`'s volumes at points `(3, ...)` in mm; beyond the slab its border."""
    origin = np.asarray(LOWER_MM, np.float32).reshape(3, *[1] * (points_mm.ndim - 1))
    found: Array = ndimage.map_coordinates(volume, points_mm - origin, order=1, mode="nearest", prefilter=False)
    return found


@functools.cache
def load_anatomy() -> Anatomy:
    """Read the template and derive all volumes; about two seconds, once per process."""
    t1, grey, white = _template()
    brain = t1 > 0
    fluid = np.where(brain, np.clip(1 - grey - white, 0, 1), 0).astype(np.float32)
    ventricle, deep = _ventricles(fluid > FLUID_SHARE)
    distance = ndimage.gaussian_filter(_signed_distance(ventricle), WALL_SMOOTHING_MM).astype(np.float32)
    normal = np.gradient(distance)
    around = ~brain | ((fluid > SULCAL_SHARE) & ~ndimage.binary_dilation(deep, iterations=3))
    edge = ndimage.distance_transform_edt(~around)
    return Anatomy(
        t1=t1,
        grey=grey,
        white=white,
        fluid=fluid,
        brain=brain.astype(np.float32),
        ventricle=np.clip(0.5 - distance / WALL_WIDTH_MM, 0, 1).astype(np.float32),
        wall_distance=distance,
        wall_normal=(normal[0].astype(np.float32), normal[1].astype(np.float32), normal[2].astype(np.float32)),
        edge_distance=ndimage.gaussian_filter(edge, EDGE_SMOOTHING_MM).astype(np.float32),
    )


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
