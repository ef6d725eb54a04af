"""Whether a head volume shows a face, from the front of its surface."""

from __future__ import annotations

import math

import nibabel
import numpy as np
from scipy import ndimage

from ld_common.imaging.volume import Volume

AIR = 0.12
"""Upper end of air, as a share of the 98th percentile of what is not the lowest value."""
GRID_MM = 2.0
HALF_WIDTH_MM = 35.0
"""The face is looked for this far to both sides of the head's middle."""
FOREHEAD_MM, FACE_MM = (40.0, 85.0), (115.0, 160.0)
"""Depths below the vertex of an adult's head."""
LEAST_DEPTH_MM = 130.0
"""A volume that ends above it does not reach the face."""
HEAD_MM = (110.0, 220.0)
"""Plausible widths of a head."""
VAULT_RADIUS_MM = 80.0
"""Radius of the sphere by which a vertex above the topmost slice is completed."""
MOST_MISSING_MM = 30.0
MOST_RECEDING_MM = 20.0


def shows_face(volume: Volume) -> bool | None:
    """Whether the surface at the height of eyes and nose lies about as far in front as the forehead.

    Defacing removes it, and so does removing the skull. It is an estimate: a chin that is far up, a child's head or
    noise in front of the head can mislead it.

    Returns:
        None where the volume does not reach from the vertex to the face or is not of a head's size.
    """
    spacing_mm = _axial_spacing(volume)
    steps = [max(1, round(GRID_MM / distance)) for distance in spacing_mm]
    voxels = volume.upright[tuple(slice(None, None, step) for step in steps)]
    slice_mm, row_mm, column_mm = (step * distance for step, distance in zip(steps, spacing_mm, strict=True))
    head = _head(voxels)
    if head is None:
        return None
    columns = np.flatnonzero(head.any((0, 1)))
    width = (columns[-1] - columns[0] + 1) * column_mm
    vertex = int(np.flatnonzero(head.any((1, 2)))[-1])
    missing = VAULT_RADIUS_MM - math.sqrt(
        max(0.0, VAULT_RADIUS_MM**2 - head[vertex].sum() * row_mm * column_mm / math.pi)
    )
    depth = missing + (vertex - np.arange(len(head))) * slice_mm
    if not HEAD_MM[0] <= width <= HEAD_MM[1] or missing > MOST_MISSING_MM or depth[0] < LEAST_DEPTH_MM:
        return None
    middle = (columns[0] + columns[-1]) / 2
    near = np.abs(np.arange(head.shape[2]) - middle) * column_mm <= HALF_WIDTH_MM
    strip = np.any(head[:, :, near], axis=2)
    front = np.where(np.any(strip, axis=1), np.argmax(strip, axis=1), strip.shape[1]) * row_mm
    forehead, face = (front[(depth >= top) & (depth <= bottom)] for top, bottom in (FOREHEAD_MM, FACE_MM))
    return bool(np.median(face) - forehead.min() <= MOST_RECEDING_MM)


def _axial_spacing(volume: Volume) -> tuple[float, float, float]:
    """Distances between slices, rows and columns of `volume.upright`."""
    axes = nibabel.io_orientation(volume.affine)[:, 0].astype(int)
    by_world = dict(zip(axes, nibabel.affines.voxel_sizes(volume.affine), strict=True))
    return float(by_world[2]), float(by_world[1]), float(by_world[0])


def _head(voxels: np.ndarray) -> np.ndarray | None:
    """The largest connected part that is not air, None where there is none."""
    above = voxels[voxels > voxels.min()]
    if not above.size:
        return None
    tissue = ndimage.binary_opening(voxels > voxels.min() + AIR * (np.percentile(above, 98) - voxels.min()))
    return largest_part(tissue) if tissue.any() else None


def largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask, which is empty where the mask is."""
    parts, count = ndimage.label(mask)
    if not count:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.asarray(parts == sizes.argmax())
