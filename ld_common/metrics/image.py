"""Image quality of images `(N,1,S,S)` in [-1, 1] against references."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB by image `(N,)`, for the range of 2 between -1 and 1."""
    error = (images - references).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp_min(1e-12))
