"""Areas of anatomical structures in images `(N,1,S,S)` in [-1, 1]: scans, reconstructions or counterfactuals."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

HEAD_LEVEL = 0.15
"""Share of the white level above which a pixel belongs to the head."""
WHITE_PERCENTILE = 85
CENTRAL_WIDTH, CENTRAL_HEIGHT = 0.30, 0.34
"""Half axes of the ellipse that holds the lateral ventricles, as shares of the head's width and height."""
CORE = 0.35
"""Share of that ellipse's axes: fluid that does not reach into this core is a sulcus, not a ventricle."""
FLUID_LEVEL = 0.4
"""Level of a ventricle's edge, from fluid (0) to white matter (1)."""
FLUID_PIXELS = 6
"""Number of darkest pixels in that ellipse whose mean is the fluid level."""
SUBDIVISION = 4

MIDDLE, LUNG_COLUMNS, LUNG_PERCENTILE = 0.05, (0.10, 0.37), 25
"""Columns, as distances from the middle of a radiograph in shares of its side, of the brightest heart and of lung; and
the percentile of the latter that gives the lung's brightness."""
ROW_SMOOTHING_MM = (4.5, 11.0)
"""Standard deviations of the smoothing along columns against the ribs, for borders and for levels."""
BORDER_REACH_MM, STEEPNESS_POWER = 22.0, 3
"""Search range around the half-way level, and the power of the steepness that weights positions in it."""
HEART_ROWS, WAIST_SEARCH_MM = (0.36, 0.80), 80.0
"""Rows of the heart, as shares of the side, and the range below the first in which the left border leaves the great
vessels."""
BELOW_WAIST_MM = (17.0, 79.0)
"""Rows below that point whose median borders give the heart's width."""
HEART_AREA_OF_WIDTH = 0.85
"""Area of a silhouette over the square of its width; a circle has pi/4."""

NEIGHBOURS = np.ones((3, 3), bool)
Array = NDArray[np.float64]


def ventricle_areas_mm2(images: Tensor, pixel_mm: float) -> Tensor:
    """Area of the lateral ventricles in axial T1 slices of the bare brain, in mm2 by image `(N,)`.

    Pixels are subdivided by bicubic interpolation. Inside an ellipse at the head's centre, everything darker than
    `FLUID_LEVEL` between fluid and white matter is ventricle. Both levels are estimated from the image, so the
    scanner's contrast and scale do not matter.
    """
    return torch.tensor([float(_ventricles(image[0]).sum()) / SUBDIVISION**2 * pixel_mm**2 for image in images])


def ventricle_edges_mm(images: Tensor, pixel_mm: float) -> Tensor:
    """Length of the lateral ventricles' edge in the same slices, in mm by image `(N,)`: area that a mm outward adds."""
    from skimage.measure import perimeter_crofton  # slow to import, and few commands need it

    lengths = [float(perimeter_crofton(_ventricles(image[0]))) for image in images]
    return torch.tensor(lengths) / SUBDIVISION * pixel_mm


def _ventricles(image: Tensor) -> NDArray[np.bool_]:
    """Mask of the lateral ventricles on the subdivided grid of an image `(S,S)`."""
    values = (image + 1) / 2
    head = _head(values)
    rows, columns = torch.where(head)
    if not len(rows):
        return np.zeros([SUBDIVISION * side for side in image.shape], bool)
    white = float(np.percentile(values[head].numpy(), WHITE_PERCENTILE))
    top, bottom, left, right = int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1
    y = torch.arange(len(values) * SUBDIVISION) / SUBDIVISION + 0.5 / SUBDIVISION
    # rows and columns of the fine grid as shares of the ellipse's half axes
    down = (y - (top + bottom) / 2) / (CENTRAL_HEIGHT * (bottom - top))
    across = (y - (left + right) / 2) / (CENTRAL_WIDTH * (right - left))
    distance = down[:, None] ** 2 + across[None, :] ** 2
    central = distance < 1
    fine = F.interpolate(values[None, None], scale_factor=SUBDIVISION, mode="bicubic", align_corners=False)[0, 0]
    darkest = fine[central].topk(min(FLUID_PIXELS * SUBDIVISION**2, int(central.sum())), largest=False).values
    level = float(darkest.mean()) + FLUID_LEVEL * (white - float(darkest.mean()))
    fluid = (central & (fine < level)).numpy()
    regions, _ = ndimage.label(fluid)
    core = (distance < CORE**2).numpy()
    return np.isin(regions, np.unique(regions[core & fluid]))


def _head(values: Tensor) -> Tensor:
    """Mask of the brain `(S,S)`: the largest bright region, holes filled; pixels that share a corner are neighbours."""
    bright = (values > HEAD_LEVEL * float(np.percentile(values.numpy(), 99))).numpy()
    regions, count = ndimage.label(bright, NEIGHBOURS)
    if not count:
        return torch.zeros_like(values, dtype=torch.bool)
    largest = regions == 1 + int(np.argmax(np.bincount(regions.ravel())[1:]))
    return torch.as_tensor(ndimage.binary_fill_holes(largest, NEIGHBOURS))


def heart_areas_mm2(images: Tensor, pixel_mm: float) -> Tensor:
    """Area of the heart's silhouette in frontal chest radiographs, in mm2 by image `(N,)`.

    Only the borders with the lungs are visible, so the area is that of a heart of usual proportions with the visible
    width: from the right to the left border, over the rows below the point where the left border leaves the great
    vessels. In each row a border is where brightness falls most steeply between middle and lung, so contrast, scale and
    a uniform haze over a lung do not matter.
    """
    return torch.tensor([_heart_area(((image[0] + 1) / 2).double().numpy(), pixel_mm) for image in images])


def heart_edges_mm(images: Tensor, pixel_mm: float) -> Tensor:
    """Length of the silhouette's edge, in mm by image `(N,)`: area that a mm of growth on either side adds."""
    return 4 * (HEART_AREA_OF_WIDTH * heart_areas_mm2(images, pixel_mm)).sqrt()


def _heart_area(values: Array, pixel_mm: float) -> float:
    borders = _heart_borders(values, pixel_mm)
    if not len(values) > borders.sum(1).min():
        return 0.0
    first, last = (round(share * len(values)) for share in HEART_ROWS)
    left = borders[first:last, 1]
    search = max(round(WAIST_SEARCH_MM / pixel_mm), 1)
    waist = int(np.argmax((left[2:] - left[:-2])[:search])) + 1
    above, below = (first + waist + round(distance / pixel_mm) for distance in BELOW_WAIST_MM)
    width = np.median(borders[above : min(below, last)], axis=0).sum() * pixel_mm
    return float(HEART_AREA_OF_WIDTH * width**2)


def _heart_borders(values: Array, pixel_mm: float) -> Array:
    """Distance in pixels from the middle to the heart's right and left border, by row `(S,2)`.

    Half the picture's width where a row has no border.
    """
    half = len(values) // 2
    fine, coarse = (ndimage.gaussian_filter1d(values, sd / pixel_mm, axis=0) for sd in ROW_SMOOTHING_MM)
    fine = ndimage.zoom(fine, (1, SUBDIVISION), order=3, grid_mode=True, mode="nearest")
    core = round(MIDDLE * len(values))
    middle = np.median(coarse[:, half - core : half + core + 1], axis=1)
    near, far = (round(share * len(values)) for share in LUNG_COLUMNS)
    reach = round(BORDER_REACH_MM / pixel_mm * SUBDIVISION)
    borders = np.full((len(values), 2), float(half))
    # columns run outward from the middle: first to the patient's right, which is the picture's left, then to the left
    for side, turned in enumerate((slice(None, None, -1), slice(None))):
        outward = fine[:, turned][:, half * SUBDIVISION :]
        lung = np.percentile(coarse[:, turned][:, half + near : half + far], LUNG_PERCENTILE, axis=1)
        dark = outward < (lung + middle)[:, None] / 2
        for row in np.flatnonzero(dark.any(1)):
            half_way = int(np.argmax(dark[row]))
            first = max(half_way - reach, 0)
            fall = np.clip(-np.gradient(outward[row])[first : half_way + reach + 1], 0, None) ** STEEPNESS_POWER
            if fall.sum() > 0:
                borders[row, side] = (np.average(np.arange(len(fall)), weights=fall) + first + 0.5) / SUBDIVISION
    return borders
