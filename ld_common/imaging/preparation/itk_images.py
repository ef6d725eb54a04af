"""Volumes between this package's convention (right, front, up) and SimpleITK's (left, back, up)."""

from __future__ import annotations

from typing import Any

import numpy as np

FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Between the two conventions, either way."""


def simpleitk() -> Any:
    """The library, imported when a step first needs it."""
    import SimpleITK

    return SimpleITK


def itk_image(voxels: np.ndarray, affine: np.ndarray) -> Any:
    """A float32 image of voxels `(I,J,K)` that `affine` places; its axes must be orthogonal."""
    image = simpleitk().GetImageFromArray(np.ascontiguousarray(voxels.T, np.float32))
    placed = FLIP @ affine
    spacing = np.linalg.norm(placed[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((placed[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(placed[:3, 3].tolist())
    return image


def voxels_of(image: Any) -> np.ndarray:
    """Voxels `(I,J,K)` of an image."""
    return np.asarray(simpleitk().GetArrayFromImage(image)).T
