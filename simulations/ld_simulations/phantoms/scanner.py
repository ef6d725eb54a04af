"""A hospital's MR scanner: from tissue contrast in [0, 1] to the numbers that a DICOM file stores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ld_common.core.config import require
from ld_simulations.phantoms.device import FWHM_PER_SD, Array, DeviceConfig, device_values, toned

SMALLEST_FIELD_OF_VIEW_MM = 200.0
RANGE_SHARE = 0.9
"""Share of the stored range that contrast 0 to 1 fills; the rest is room for noise and bias."""


@dataclass
class ScannerConfig(DeviceConfig):
    """How one hospital's scanner sees and stores."""

    resolution_mm: float = 3.4
    """Width at half height of the scanner's point spread, in the plane of the slice."""
    gamma: float = 1.0
    """Contrast is raised to this power: below 1 fluid and grey matter are brighter."""
    s_curve: float = 0.0
    """From 0 to 1: how far middle tones are pulled apart."""
    tissue_contrast: float = 1.0
    """Scale of contrast; below 1 the brightest tissue stays below the range's top."""
    bias_strength: float = 0.1
    """Deviation of the smooth multiplicative field's logarithm, about, at the corners of the picture."""
    noise_sd: float = 0.007
    """Deviation of each of the two channels of Rician noise, contrast units."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_field_of_view(SMALLEST_FIELD_OF_VIEW_MM)
        require(self.resolution_mm >= 0, f"resolution_mm is {self.resolution_mm}: it must not be negative")
        require(self.gamma > 0 and 0 <= self.s_curve <= 1, "use gamma above 0 and s_curve from 0 to 1")
        require(0 < self.tissue_contrast <= 1, f"tissue_contrast is {self.tissue_contrast}: use above 0 up to 1")
        require(self.bias_strength >= 0 and self.noise_sd >= 0, "bias_strength and noise_sd must not be negative")


def acquire(contrast: Array, config: ScannerConfig, bias: Array, rng: np.random.Generator) -> Array:
    """Device values (H,W), float32, of tissue contrast (H,W) in [0,1]: blur, tone curve, bias field, Rician noise.

    `bias` holds the patient's five coefficients of the scanner's field. The values are those that the file can hold,
    so that reading the file back returns them exactly.
    """
    blurred = ndimage.gaussian_filter(contrast, config.resolution_mm / FWHM_PER_SD / config.spacing_mm)
    tone = toned(blurred, config.gamma, config.s_curve)
    seen = config.tissue_contrast * tone * bias_field(contrast.shape, config.bias_strength, bias)
    noise = config.noise_sd * rng.standard_normal((2, *contrast.shape))
    seen = np.hypot(seen + noise[0], noise[1])
    return device_values(seen * RANGE_SHARE, config)


def bias_field(shape: tuple[int, ...], strength: float, coefficients: Array) -> NDArray[np.float64]:
    """The smooth field (H,W) around 1 that multiplies a slice: the exponential of a quadratic in both directions."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    terms = np.stack([y, x, y * x, y * y - 1 / 3, x * x - 1 / 3])
    field: NDArray[np.float64] = np.exp(strength / 2 * np.tensordot(coefficients, terms, 1))
    return field
