"""A hospital's X-ray detector: from what a phantom takes away of the beam to the numbers that a DICOM file stores.

The signal is the share of the beam that arrives, exp(-attenuation), blurred by the detector, with scattered radiation
added and photons counted. What a file holds is the negative logarithm of that, through the hospital's tone curve: the
more the phantom has held back, the brighter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ld_common.core.config import require
from ld_simulations.phantoms.device import FWHM_PER_SD, Array, DeviceConfig, device_values, toned

SMALLEST_FIELD_OF_VIEW_MM = 340.0
SCATTER_MM = 70.0
"""Width at half height of the scattered radiation of one ray."""
LEAST_SIGNAL = 1e-4
RANGE_SHARE = 0.96
"""Share of the stored range that the tone curve fills."""


@dataclass
class DetectorConfig(DeviceConfig):
    """How one hospital's detector sees and stores."""

    digital: bool = True
    """A digital detector (DX); false is computed radiography from a storage plate (CR)."""
    rows: int = 192
    columns: int = 192
    spacing_mm: float = 2.2
    resolution_mm: float = 3.0
    """Width at half height of the detector's point spread."""
    scatter_share: float = 0.25
    """Share of the signal that is scattered radiation: about 0.2 with a good grid, 0.6 without."""
    photons: float = 2e5
    """Photons that a pixel counts where nothing holds the beam back."""
    darkest_attenuation: float = 1.3
    brightest_attenuation: float = 4.9
    """Attenuations that are drawn black and white."""
    gamma: float = 1.0
    """Tones are raised to this power: below 1 the lungs are brighter."""
    s_curve: float = 0.3
    """From 0 to 1: how far middle tones are pulled apart."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_field_of_view(SMALLEST_FIELD_OF_VIEW_MM)
        require(self.resolution_mm >= 0, f"resolution_mm is {self.resolution_mm}: it must not be negative")
        require(0 <= self.scatter_share < 1, f"scatter_share is {self.scatter_share}: use 0 up to below 1")
        require(self.photons > 0, f"photons is {self.photons}: use above 0")
        require(self.gamma > 0 and 0 <= self.s_curve <= 1, "use gamma above 0 and s_curve from 0 to 1")
        require(
            0 <= self.darkest_attenuation < self.brightest_attenuation,
            "use 0 <= darkest_attenuation < brightest_attenuation",
        )
        # the standard's CR and DX images hold unsigned numbers, and those of DX mean nothing but themselves
        require(not self.signed, "signed: a radiograph's numbers are unsigned")
        plain = self.rescale_slope == 1 and self.rescale_intercept == 0
        require(plain or not self.digital, "rescale_slope, rescale_intercept: DX images have none but 1 and 0")


def expose(attenuation: Array, config: DetectorConfig, rng: np.random.Generator) -> Array:
    """Device values (H,W), float32, of attenuation (H,W), the integral of the coefficient along each ray.

    The values are those that the file can hold, so that reading the file back returns them exactly.
    """
    pixel_sd = 1 / FWHM_PER_SD / config.spacing_mm
    direct = ndimage.gaussian_filter(np.exp(-attenuation.astype(np.float64)), config.resolution_mm * pixel_sd)
    scattered = ndimage.gaussian_filter(direct, SCATTER_MM * pixel_sd, mode="nearest")
    signal = (1 - config.scatter_share) * direct + config.scatter_share * scattered
    # many photons: their number's deviation is its root
    signal = signal + np.sqrt(signal / config.photons) * rng.standard_normal(signal.shape)
    seen = -np.log(np.maximum(signal, LEAST_SIGNAL)) - config.darkest_attenuation
    shares = seen / (config.brightest_attenuation - config.darkest_attenuation)
    return device_values(toned(shares, config.gamma, config.s_curve) * RANGE_SHARE, config)
