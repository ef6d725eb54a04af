"""Simple head volumes with and without a face."""

from __future__ import annotations

import numpy as np

SPACING_MM = 3.0
SHAPE = (66, 84, 74)


def head(face: bool = True, skull: bool = True, lowest_mm: float = 0.0) -> np.ndarray:
    """Voxels (to the right, to the front, up) of an ellipsoid on a neck, with nose, cheeks and chin in front."""
    right, front, up = (SPACING_MM * axis for axis in np.meshgrid(*map(np.arange, SHAPE), indexing="ij"))
    right, front, up = right - 99, front - 115, up - 140
    scale = 1.0 if skull else 0.85
    tissue = (right / 75) ** 2 + (front / 95) ** 2 + (up / 70) ** 2 < scale**2
    if skull:
        tissue |= (np.hypot(right, front + 25) < 55) & (up < 0)
    if face:
        tissue |= (np.abs(right) < 55) & (front > 0) & (front < 86) & (up < 10) & (up > -120)
        tissue |= (np.abs(right) < 14) & (front > 0) & (front < 108) & (up < -25) & (up > -60)
    noise = np.abs(np.random.default_rng(0).normal(0, 8, SHAPE))
    voxels = np.where(tissue, 400.0, 0.0) + noise
    return voxels[:, :, round(lowest_mm / SPACING_MM) :].astype(np.float32)
