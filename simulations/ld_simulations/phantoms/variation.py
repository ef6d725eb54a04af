"""How patients differ beside their attributes: anatomy that bends, tissue with a texture, in 2 or 3 dimensions."""

from __future__ import annotations

import functools

import numpy as np
from scipy import ndimage

from ld_simulations.phantoms.device import Array


def bent(points: Array, waves: Array, phases: Array, amplitudes: Array) -> Array:
    """Points `(D,...)` displaced by W waves: wave vectors `(W,D)`, phases `(W,)` and amplitudes `(W,D)`."""
    angles = np.tensordot(waves, points, 1) + phases.reshape(-1, *[1] * (points.ndim - 1))
    moved: Array = points + np.tensordot(amplitudes.T, np.sin(angles), 1)
    return moved


def texture_at(points: Array, side: int, smoothing: float) -> Array:
    """Smooth noise of unit deviation at points `(D,...)` in its pixels; it repeats after `side` of them.

    All patients share it; each has another place in it.
    """
    noise = _periodic_noise(side, len(points), smoothing)
    values: Array = ndimage.map_coordinates(noise, points, order=1, mode="grid-wrap", prefilter=False)
    return values


@functools.cache
def _periodic_noise(side: int, dimensions: int, smoothing: float) -> Array:
    noise = np.random.default_rng(0).standard_normal((side,) * dimensions)
    smooth = ndimage.gaussian_filter(noise, smoothing, mode="wrap")
    unit: Array = (smooth / smooth.std()).astype(np.float32)
    return unit
