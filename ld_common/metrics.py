"""What is measured on images `(N,1,S,S)` in [-1, 1], the same on scans, reconstructions and counterfactuals."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from monai.transforms import FillHoles, KeepLargestConnectedComponent
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
"""Where, from fluid (0) to white matter (1), the edge of a ventricle is drawn."""
FLUID_PIXELS = 6
"""The darkest pixels of that ellipse, whose mean is the fluid's level."""
SUBDIVISION = 4


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB by image `(N,)`, for the range of 2 between -1 and 1."""
    error = (images - references).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp_min(1e-12))


def ventricle_areas_mm2(images: Tensor, pixel_mm: float) -> Tensor:
    """Area of the lateral ventricles in axial T1 slices of the bare brain, in mm2 by image `(N,)`.

    Pixels are split into quarters by bicubic interpolation; what is darker than half way between white matter and
    fluid, inside an ellipse about the head's centre, is ventricle. Both levels are read from the image itself, so
    the scanner's contrast and scale do not matter.
    """
    return torch.tensor([_area(image[0]) * pixel_mm**2 for image in images])


def _area(image: Tensor) -> float:
    values = (image + 1) / 2
    head = _head(values)
    rows, columns = torch.where(head)
    if not len(rows):
        return 0.0
    white = float(np.percentile(values[head].numpy(), WHITE_PERCENTILE))
    top, bottom, left, right = int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1
    y = torch.arange(len(values) * SUBDIVISION) / SUBDIVISION + 0.5 / SUBDIVISION
    # rows and columns of the fine grid as shares of the ellipse's half axes
    down = (y - (top + bottom) / 2) / (CENTRAL_HEIGHT * (bottom - top))
    across = (y - (left + right) / 2) / (CENTRAL_WIDTH * (right - left))
    distance = down[:, None] ** 2 + across[None, :] ** 2
    central = distance < 1
    fine = F.interpolate(values[None, None], scale_factor=SUBDIVISION, mode="bicubic", align_corners=False)[0, 0]
    darkest = fine[central].sort().values[: FLUID_PIXELS * SUBDIVISION**2]
    level = float(darkest.mean()) + FLUID_LEVEL * (white - float(darkest.mean()))
    fluid = (central & (fine < level)).numpy()
    regions, _ = ndimage.label(fluid)
    core = (distance < CORE**2).numpy()
    return float(np.isin(regions, np.unique(regions[core & fluid])).sum()) / SUBDIVISION**2


def _head(values: Tensor) -> Tensor:
    """The brain's mask `(S,S)`: the largest bright region with its holes filled."""
    bright = values > HEAD_LEVEL * float(np.percentile(values.numpy(), 99))
    filled = FillHoles()(KeepLargestConnectedComponent()(bright[None].float()))
    return torch.as_tensor(np.asarray(filled))[0] > 0
