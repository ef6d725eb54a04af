"""What every imaging device has: the grid of its pixels, and the integers that its files hold.

*Device values* are what a reader has after the rescale of the header, higher is brighter: `intercept + slope * n`.
*Stored values* are the integers of the file; under MONOCHROME1 they run the other way, n -> highest - (n - lowest):
whoever rescales those must mirror the range to get device values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ld_common.core.config import require

Array = NDArray[np.float32]

FWHM_PER_SD = 2.3548
"""Width at half height of a Gaussian of unit deviation."""


@dataclass
class DeviceConfig:
    """How one hospital's device lays out and stores a picture."""

    manufacturer: str = "Lindenblatt"
    rows: int = 128
    columns: int = 128
    spacing_mm: float = 1.7
    bits_stored: int = 12
    signed: bool = False
    """Pixel Representation: two's complement."""
    monochrome1: bool = False
    rescale_slope: float = 1.0
    rescale_intercept: float = 0.0

    def __post_init__(self) -> None:
        require(min(self.rows, self.columns) > 0 and self.spacing_mm > 0, "use rows, columns and spacing_mm above 0")
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

    def require_field_of_view(self, smallest_mm: float) -> None:
        """Raise `ConfigError` unless the shorter side shows `smallest_mm`."""
        shown = min(self.rows, self.columns) * self.spacing_mm
        require(
            shown >= smallest_mm, f"rows, columns, spacing_mm show {shown:.0f} mm: use at least {smallest_mm:.0f} mm"
        )


def toned(shares: NDArray[np.float64], gamma: float, s_curve: float) -> NDArray[np.float64]:
    """Shares of the range, clipped to 0 to 1, raised to `gamma`, with middle tones pulled apart by `s_curve`."""
    tone = np.clip(shares, 0, 1) ** gamma
    curved: NDArray[np.float64] = tone + s_curve * (tone * tone * (3 - 2 * tone) - tone)
    return curved


def device_values(shares: NDArray[np.float64], config: DeviceConfig) -> Array:
    """Device values (H,W), float32, of shares of the stored range, 0 to 1: those that the file can hold exactly."""
    low, high = config.stored_range
    steps = np.clip(np.rint(low + shares * (high - low)), low, high)
    values: Array = (config.rescale_intercept + config.rescale_slope * steps).astype(np.float32)
    return values


def stored_values(values: Array, config: DeviceConfig) -> NDArray[np.integer]:
    """The integers (H,W) that the file stores for device values, in the file's own type."""
    low, high = config.stored_range
    scaled = (values.astype(np.float64) - config.rescale_intercept) / config.rescale_slope
    steps = np.clip(np.rint(scaled), low, high)
    if config.monochrome1:
        steps = high - (steps - low)
    return steps.astype(f"{'i' if config.signed else 'u'}{config.bits_allocated // 8}")
