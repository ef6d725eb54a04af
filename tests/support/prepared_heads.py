"""A phantom brain of cortex, white matter, ventricles and odd spots, for tests of how volumes are prepared."""

from __future__ import annotations

import hashlib
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

SPACING_MM = 4.0
SHAPE = (48, 56, 46)


def brain(scalp: bool = False, thinned: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (to the right, to the front, up), float32, and their affine; with `scalp`, in a dark skull under it.

    Of every `thinned` voxels along each axis, one is kept.
    """
    axes = [SPACING_MM * (np.arange(length) - (length - 1) / 2) for length in SHAPE]
    right, front, up = np.meshgrid(*axes, indexing="ij")

    def inside(sides: tuple[float, float, float], middle: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
        places = zip((right, front, up), middle, sides, strict=True)
        return np.asarray(sum(((place - centre) / side) ** 2 for place, centre, side in places) < 1)

    voxels = np.zeros(SHAPE, np.float32)
    if scalp:
        voxels[inside((86, 104, 76))] = 900
        voxels[inside((78, 96, 68))] = 60
    voxels[inside((66, 84, 54))] = 500
    voxels[inside((54, 70, 42))] = 800
    voxels[inside((12, 26, 12), (-14, 6, 4)) | inside((12, 22, 14), (15, 2, 4))] = 200
    voxels[inside((14, 10, 12), (-30, 40, 10))] = 350
    voxels[inside((10, 16, 10), (34, -30, -16))] = 350
    texture = ndimage.gaussian_filter(np.random.default_rng(0).normal(0, 1, SHAPE), 2.0)
    voxels += np.where(inside((62, 80, 50)), 60 * texture / texture.std(), 0).astype(np.float32)
    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
    affine[:3, 3] = [axis[0] for axis in axes]
    smooth = ndimage.gaussian_filter(voxels, 0.7 * thinned)[::thinned, ::thinned, ::thinned]
    return smooth, affine @ np.diag([thinned, thinned, thinned, 1.0])


def write_volume(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(np.ascontiguousarray(voxels, np.float32), affine)
    image.set_qform(affine, code="scanner")
    nibabel.save(image, path)
    return path


def digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
