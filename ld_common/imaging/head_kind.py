"""Whether a slice shows a whole head or a stripped brain, from the grey values below its surface.

Below the surface of a whole head in T1 comes bright scalp, then the dark skull, then the brain. A stripped brain has no
dark layer under a brighter one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import ndimage

from ld_common.imaging.geometry import Scan
from ld_common.imaging.modality import STRIPPED, WHOLE
from ld_common.imaging.rejection import Rejection, ScanRejected

AIR = 0.12
"""Upper end of air, as a share of the 98th percentile of what is not the lowest value."""
LAYER_MM = 1.5
RIM_MM, SKULL_MM = 9.0, 18.0
"""Depths within which the scalp's brightest layer and the skull's darkest one are looked for."""
WHOLE_BELOW, STRIPPED_ABOVE = 0.65, 0.85
"""Grey of the darkest layer by that of a brighter one above it. Real whole heads had 0.07 to 0.50, stripped brains 0.93
to 1.00 (seven slices of each of five heads and six brains); between the bounds nothing is said."""
LEAST_CM2 = 60.0
"""Area of a slice that can be judged: the top of a brain is too small."""
CLOSING_MM = 3.0
LEAST_PIXELS = 20
"""Of a layer."""
WORDS = {WHOLE: "a whole head with skull and scalp", STRIPPED: "a brain without skull"}
REMEDY = {
    WHOLE: "give the scan as it was before its skull was removed",
    STRIPPED: "remove its skull as the study says",
}
"""What to do where the modality asks for the kind."""


def check_head(path: Path, scan: Scan, expected: str) -> None:
    """Refuse a slice that clearly shows another kind of head than `expected`, which is one of `HEADS`.

    Raises:
        ScanRejected: with the geometry's reason.
    """
    shown = head_kind(scan) if expected else None
    if shown is not None and shown != expected:
        detail = f"it shows {WORDS[shown]}, and the modality has {WORDS[expected]}: {REMEDY[expected]}"
        raise ScanRejected(path, Rejection.WRONG_GEOMETRY, detail)


def head_kind(scan: Scan) -> str | None:
    """`WHOLE`, `STRIPPED`, or None where the slice has no spacing, is too small or lies between the two."""
    if scan.spacing_mm is None:
        return None
    darkening = skull_darkening(scan.pixels, scan.spacing_mm)
    if darkening is None or WHOLE_BELOW < darkening < STRIPPED_ABOVE:
        return None
    return WHOLE if darkening <= WHOLE_BELOW else STRIPPED


def skull_darkening(pixels: np.ndarray, spacing_mm: tuple[float, float]) -> float | None:
    """Least grey of a layer under a brighter one near the surface, by that one's grey; 1 if it only gets brighter.

    Args:
        pixels: an axial slice of a head `(H,W)`, air dark.
        spacing_mm: distance between rows and between columns.
    """
    low = float(pixels.min())
    above = pixels[pixels > low]
    if not above.size:
        return None
    grey = np.clip((pixels - low) / (np.percentile(above, 98) - low), 0, 1)
    inside = _inside(grey > AIR, spacing_mm)
    if inside.sum() * spacing_mm[0] * spacing_mm[1] < 100 * LEAST_CM2:
        return None
    depth_mm = ndimage.distance_transform_edt(np.pad(inside, 1), sampling=spacing_mm)[1:-1, 1:-1]
    width = max(LAYER_MM, *spacing_mm)
    layers = []
    for top in np.arange(0, SKULL_MM, LAYER_MM):
        values = grey[(depth_mm > top) & (depth_mm <= top + width)]
        layers.append(float(np.median(values)) if values.size > LEAST_PIXELS else np.nan)
    ratios = [
        below / max(layer, 1e-6)
        for number, layer in enumerate(layers[: round(RIM_MM / LAYER_MM)])
        for below in layers[number + 1 :]
        if not (np.isnan(layer) or np.isnan(below))
    ]
    return min([1.0, *ratios])


def _inside(tissue: np.ndarray, spacing_mm: tuple[float, float]) -> np.ndarray:
    """The head's or brain's outline, filled: the larger connected parts, closed over thin gaps."""
    parts, count = ndimage.label(ndimage.binary_opening(tissue))
    if not count:
        return np.zeros_like(tissue)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    larger = np.isin(parts, np.flatnonzero(sizes > 0.05 * sizes.max()))
    steps = max(1, round(CLOSING_MM / min(spacing_mm)))
    closed = ndimage.binary_closing(np.pad(larger, steps + 1), iterations=steps)
    return np.asarray(ndimage.binary_fill_holes(closed)[steps + 1 : -steps - 1, steps + 1 : -steps - 1])
