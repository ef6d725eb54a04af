"""A hospital's scanner: from tissue contrast to the numbers that a DICOM file stores.

Values come in three kinds. *Contrast* lies in [0, 1]. *Scanner values* are what a reader has after the rescale of the
header, higher is brighter: `intercept + slope * n`. *Stored values* are the integers of the file; under MONOCHROME1
they run the other way, n -> highest - (n - lowest): whoever rescales those must mirror the range to get scanner values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ld_common.config import require
from ld_simulations.anatomy import Array

SMALLEST_FIELD_OF_VIEW_MM = 200.0
FWHM_PER_SD = 2.3548
"""Width at half height of a Gaussian of unit deviation."""
RANGE_SHARE = 0.9
"""Share of the stored range that contrast 0 to 1 fills; the rest is room for noise and bias."""


@dataclass
class ScannerConfig:
    """How one hospital's scanner sees and stores."""

    manufacturer: str = "Lindenblatt"
    rows: int = 128
    columns: int = 128
    spacing_mm: float = 1.7
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
    bits_stored: int = 12
    signed: bool = False
    """Pixel Representation: two's complement."""
    monochrome1: bool = False
    rescale_slope: float = 1.0
    rescale_intercept: float = 0.0

    def __post_init__(self) -> None:
        field_of_view = min(self.rows, self.columns) * self.spacing_mm
        require(
            field_of_view >= SMALLEST_FIELD_OF_VIEW_MM,
            f"rows, columns, spacing_mm show {field_of_view:.0f} mm: use at least {SMALLEST_FIELD_OF_VIEW_MM:.0f} mm",
        )
        require(self.resolution_mm >= 0, f"resolution_mm is {self.resolution_mm}: it must not be negative")
        require(self.gamma > 0 and 0 <= self.s_curve <= 1, "use gamma above 0 and s_curve from 0 to 1")
        require(0 < self.tissue_contrast <= 1, f"tissue_contrast is {self.tissue_contrast}: use above 0 up to 1")
        require(self.bias_strength >= 0 and self.noise_sd >= 0, "bias_strength and noise_sd must not be negative")
        require(8 <= self.bits_stored <= 16, f"bits_stored is {self.bits_stored}: use 8 to 16")
        require(self.rescale_slope > 0, f"rescale_slope is {self.rescale_slope}: use above 0")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.columns

    @property
    def bits_allocated(self) -> int:
        """8 or 16."""
        return 8 if self.bits_stored == 8 else 16

    @property
    def stored_range(self) -> tuple[int, int]:
        """Lowest and highest integer that the file can hold."""
        top: int = 2**self.bits_stored
        return (-top // 2, top // 2 - 1) if self.signed else (0, top - 1)


def acquire(contrast: Array, config: ScannerConfig, bias: Array, rng: np.random.Generator) -> Array:
    """Scanner values (H,W), float32, of tissue contrast (H,W) in [0,1]: blur, tone curve, bias field, Rician noise.

    `bias` holds the patient's five coefficients of the scanner's field. The values are those that the file can hold,
    so that reading the file back returns them exactly.
    """
    blurred = ndimage.gaussian_filter(contrast, config.resolution_mm / FWHM_PER_SD / config.spacing_mm)
    toned = np.clip(blurred, 0, 1) ** config.gamma
    toned = toned + config.s_curve * (toned * toned * (3 - 2 * toned) - toned)
    seen = config.tissue_contrast * toned * bias_field(contrast.shape, config.bias_strength, bias)
    noise = config.noise_sd * rng.standard_normal((2, *contrast.shape))
    seen = np.hypot(seen + noise[0], noise[1])
    low, high = config.stored_range
    steps = np.clip(np.rint(low + seen * RANGE_SHARE * (high - low)), low, high)
    values: Array = (config.rescale_intercept + config.rescale_slope * steps).astype(np.float32)
    return values


def bias_field(shape: tuple[int, ...], strength: float, coefficients: Array) -> NDArray[np.float64]:
    """The smooth field (H,W) around 1 that multiplies a slice: the exponential of a quadratic in both directions."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    terms = np.stack([y, x, y * x, y * y - 1 / 3, x * x - 1 / 3])
    field: NDArray[np.float64] = np.exp(strength / 2 * np.tensordot(coefficients, terms, 1))
    return field


def stored_values(scanner_values: Array, config: ScannerConfig) -> NDArray[np.integer]:
    """The integers (H,W) that the file stores for scanner values, in the file's own type."""
    low, high = config.stored_range
    scaled = (scanner_values.astype(np.float64) - config.rescale_intercept) / config.rescale_slope
    steps = np.clip(np.rint(scaled), low, high)
    if config.monochrome1:
        steps = high - (steps - low)
    return steps.astype(f"{'i' if config.signed else 'u'}{config.bits_allocated // 8}")
