"""Resampling between a scan's pixel grid and the model's square picture.

Both grids lie in one plane and share their centre. A pixel is an area whose value is sampled at its middle.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ld_common.core.errors import ScanError
from ld_common.imaging.modality import Attributes, ImageConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scan:
    """One two-dimensional image as a file holds it."""

    pixels: np.ndarray
    """float32 `(H,W)` in the file's real values, higher is brighter. Columns run to the left, rows to the back in an
    axial slice and to the feet in a frontal view."""
    spacing_mm: tuple[float, float] | None
    """Distance between rows and between columns; None if unknown (PNG)."""
    attributes_in_file: Attributes
    """The modality's attributes (age, sex) that the file gives with a value known to the modality."""
    affine: np.ndarray | None = None
    """`(4,4)`: (column, row, 0, 1) -> millimetres to the right, to the front, up; None if unknown."""
    orientation: tuple[str, str] | None = None
    """Directions of rows and columns, as DICOM's Patient Orientation; None if unknown."""
    patient_id: str = ""
    """DICOM's; it stays in memory, to tell whether two scans are of one patient. Empty if unknown."""
    study_date: datetime.date | None = None
    frame_of_reference: str = ""
    """DICOM's UID of the coordinate system; it stays in memory unless the user asks to keep it. Empty if unknown."""


@dataclass(frozen=True, eq=False)
class Frame:
    """Intensity window and geometry that `from_model` needs to invert `to_model`."""

    low: float
    """Real value that became -1."""
    high: float
    """Real value that became 1."""
    shape: tuple[int, int]
    spacing_mm: tuple[float, float] | None
    field_of_view: float
    """Side of the picture's square, in mm, or in pixels if the spacing is unknown."""
    affine: np.ndarray | None


def to_model(scan: Scan, side: int, config: ImageConfig, window: Frame | None = None) -> tuple[Tensor, Frame]:
    """The model's picture `(1,side,side)`, float32 in [-1,1], of a square field of view at the scan's centre.

    Pixels outside the image are -1. Values are clipped to the window before they are resampled.

    Args:
        scan: the scan.
        side: height and width of the picture.
        config: field of view and percentiles of the window.
        window: a frame whose `low` and `high` replace the percentiles, so that two scans can be compared.

    Raises:
        ScanError: the image has no contrast.
    """
    import torch  # seconds, which a process that only decodes saves

    low, high = value_range(scan, config) if window is None else (window.low, window.high)
    height, width = scan.pixels.shape
    row_mm, column_mm = scan.spacing_mm or (1.0, 1.0)
    whole = max(height * row_mm, width * column_mm)
    # a field of view in mm needs a spacing; without one the longer side is used
    fov = config.field_of_view_mm if config.field_of_view_mm and scan.spacing_mm else whole
    frame = Frame(low, high, (height, width), scan.spacing_mm, fov, scan.affine)
    rows = resampling_matrix(height, row_mm, side, fov / side)
    columns = resampling_matrix(width, column_mm, side, fov / side)
    signal = np.clip((scan.pixels.astype(np.float64) - low) / (high - low), 0, 1)  # outside the image: 0
    picture = np.clip(2 * (rows @ signal @ columns.T) - 1, -1, 1)
    return torch.from_numpy(picture.astype(np.float32))[None], frame


def value_range(scan: Scan, config: ImageConfig) -> tuple[float, float]:
    """The real values that become -1 and 1: percentiles of the scan's pixels.

    Raises:
        ScanError: both are equal.
    """
    low, high = np.percentile(scan.pixels, [config.low_percentile, config.high_percentile])
    if not low < high:
        raise ScanError(f"the image has no contrast: its percentiles are both {low:g}; use another slice")
    return float(low), float(high)


def from_model(image: Tensor, frame: Frame) -> np.ndarray:
    """A picture `(1,S,S)` in [-1,1] as float32 `(H,W)` in the scan's geometry and real values.

    Pixels outside the picture's field of view get the frame's low value.
    """
    height, width = frame.shape
    row_mm, column_mm = frame.spacing_mm or (1.0, 1.0)
    side = image.shape[-1]
    rows = resampling_matrix(side, frame.field_of_view / side, height, row_mm)
    columns = resampling_matrix(side, frame.field_of_view / side, width, column_mm)
    picture = image.detach().cpu().double().numpy().reshape(side, side)
    values = frame.low + (frame.high - frame.low) / 2 * (rows @ (picture + 1) @ columns.T)
    return values.astype(np.float32)


def resampling_matrix(sources: int, source_mm: float, targets: int, target_mm: float) -> np.ndarray:
    """Resampling weights `(targets, sources)` between two rows of pixels that share their centre.

    Interpolates linearly to finer targets and averages with a triangle two targets wide for coarser ones, as torch's
    antialiased bilinear resampling does, for any ratio and field of view. Targets outside the sources get zeros.
    """
    source = (np.arange(sources) + 0.5 - sources / 2) * source_mm
    target = (np.arange(targets) + 0.5 - targets / 2) * target_mm
    reach = max(source_mm, target_mm)
    weights = np.clip(1 - np.abs(target[:, None] - source[None, :]) / reach, 0, None)
    inside = np.abs(target) <= sources * source_mm / 2 * (1 + 1e-9)
    total = weights.sum(1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=inside[:, None] & (total > 0))
