"""Writes an answer into the scan's own pixels.

The model's picture is coarser than most scans, and its autoencoder loses detail. An answer is therefore given as a
change of the scan, taken between the model's reconstruction and its answer:

    deformation   the scan, moved by the displacement between both: sharp, right where tissue grows or shrinks
    difference    the scan plus the answer minus the reconstruction: right where brightness changes
    decoded       the answer itself, in the model's resolution
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from ld_common.imaging.geometry import Frame, Scan, from_model, resampling_matrix, to_model
from ld_common.imaging.modality import DECODED, DIFFERENCE, ImageConfig

if TYPE_CHECKING:
    from torch import Tensor

ATTACHMENT, TIGHTNESS = 15.0, 0.1
"""Of the TV-L1 optical flow (Zach et al. 2007), chosen on the tuning patients of `ld-benchmark individual`."""
SMOOTHING, MOST_SMOOTHING, SMOOTHER = 1 / 180, 1 / 16, 1.3
"""Least and largest standard deviation of the displacement's smoothing, as shares of the picture's side, and the factor
between two that are tried."""
LEAST_STRETCH = 0.2
"""Least determinant of the deformation's derivative: below 0 tissue folds, near 0 it is torn."""


def render(pixels: np.ndarray, frame: Frame, reconstruction: Tensor, answer: Tensor, rendering: str) -> np.ndarray:
    """An answer in the scan's grid and real values, float32 `(H,W)`.

    Args:
        pixels: the scan `(H,W)`.
        frame: the scan's.
        reconstruction: the model's picture of the scan `(1,S,S)` in [-1, 1].
        answer: the model's answer `(1,S,S)`.
        rendering: `deformation`, `difference` or `decoded`.
    """
    if rendering == DECODED:
        return from_model(answer, frame)
    if rendering == DIFFERENCE:
        return pixels.astype(np.float32) + from_model(answer, frame) - from_model(reconstruction, frame)
    return deform(pixels, frame, displacement(reconstruction, answer))


def reference_of(rendering: str) -> str:
    """What the change of an answer is counted from: `scan`, or `reconstruction` where it is decoded."""
    return "reconstruction" if rendering == DECODED else "scan"


def picture_of(values: np.ndarray, frame: Frame, side: int, config: ImageConfig) -> Tensor:
    """The model's picture `(1,side,side)` of what is written into a scan's grid `(H,W)`, in the scan's grey range."""
    return to_model(Scan(values, frame.spacing_mm, {}), side, config, frame)[0]


def displacement(before: Tensor, after: Tensor) -> np.ndarray:
    """Where in `before` each pixel of `after` comes from, `(2,S,S)`: rows and columns to go, in pixels.

    It is smoothed as little as keeps tissue from folding.

    Args:
        before: picture `(1,S,S)` in [-1, 1].
        after: picture `(1,S,S)`.
    """
    from skimage.registration import optical_flow_tvl1  # a second

    first, second = ((picture[0].float().cpu().numpy() + 1) / 2 for picture in (before, after))
    flow = optical_flow_tvl1(second, first, attachment=ATTACHMENT, tightness=TIGHTNESS)
    share = SMOOTHING
    while True:
        field = np.stack([ndimage.gaussian_filter(part, share * len(first)) for part in flow])
        if share >= MOST_SMOOTHING or stretch(field).min() >= LEAST_STRETCH:
            return field
        share *= SMOOTHER


def stretch(field: np.ndarray) -> np.ndarray:
    """Determinant of the derivative of x + field(x), `(S,S)`: the area in `before` that a pixel's area comes from."""
    (down_down, down_across), (across_down, across_across) = (np.gradient(part) for part in field)
    determinant: np.ndarray = (1 + down_down) * (1 + across_across) - down_across * across_down
    return determinant


def deform(pixels: np.ndarray, frame: Frame, field: np.ndarray) -> np.ndarray:
    """A scan `(H,W)` moved by a `displacement` of the model's picture; outside of the picture nothing moves."""
    height, width = frame.shape
    row_mm, column_mm = frame.spacing_mm or (1.0, 1.0)
    side = field.shape[-1]
    pixel_mm = frame.field_of_view / side
    rows = resampling_matrix(side, pixel_mm, height, row_mm)
    columns = resampling_matrix(side, pixel_mm, width, column_mm)
    at = np.mgrid[:height, :width].astype(np.float64)
    for axis, step in enumerate((row_mm, column_mm)):
        at[axis] += rows @ field[axis] @ columns.T * pixel_mm / step
    moved = ndimage.map_coordinates(pixels.astype(np.float64), at, order=3, mode="nearest")
    return moved.clip(pixels.min(), pixels.max()).astype(np.float32)  # splines overshoot
