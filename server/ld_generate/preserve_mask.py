"""Regions of a scan that an edit leaves unchanged, as `--preserve-mask` names them.

White is kept. Inpainting masks of diffusers mean the opposite: white is repainted.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import ndimage

from ld_common.core.errors import RequestError
from ld_common.imaging.geometry import Frame, Scan
from ld_common.imaging.modality import Modality
from ld_common.imaging.readers import read_scan, read_volume
from ld_common.imaging.volume import Volume, check_same_grid

FEATHER = 2.0
"""Width, in pixels of the model's picture, of the band outside the region over which an edit fades in."""


def read_preserve_mask(
    path: Path, modality: Modality, slice_index: int | None, scan: Scan, frame: Frame, resolution: int
) -> np.ndarray:
    """Share of the scan in each pixel `(H,W)`: 1 in the region, falling to 0 outside it.

    Args:
        path: image of the scan's size, not 0 in the region; of a volume, the scan's slice is read.
        modality: the scan's.
        slice_index: the scan's.
        scan: the scan.
        frame: the scan's.
        resolution: side of the model's picture, in pixels.

    Raises:
        ScanError: the image cannot be read.
        RequestError: it has another size, or is 0 everywhere.
    """
    region = read_scan(path, modality.as_in_files(), slice_index, released=True).pixels != 0
    if region.shape != scan.pixels.shape:
        raise RequestError(
            f"the mask '{path}' has {region.shape[0]} x {region.shape[1]} pixels, the scan {scan.pixels.shape[0]} x "
            f"{scan.pixels.shape[1]}: draw it on the input.png that ld-generate writes"
        )
    if not region.any():
        raise RequestError(f"the mask '{path}' is 0 everywhere: paint what shall be kept white")
    return _feathered(region, scan, frame, resolution)


def read_preserve_mask_volume(
    path: Path, modality: Modality, volume: Volume, edited: range, frame: Frame, resolution: int
) -> list[np.ndarray]:
    """The same for each edited slice of a volume; the mask has the volume's voxels.

    Raises:
        ScanError: the mask cannot be read, or has another grid.
        RequestError: it is 0 in all edited slices.
    """
    mask = read_volume(path, modality.as_in_files(), released=True)
    check_same_grid(path, mask, volume)
    regions = [mask.upright[index] != 0 for index in edited]
    if not any(region.any() for region in regions):
        raise RequestError(f"the mask '{path}' is 0 in all edited slices: check --slices, or leave it out")
    return [
        _feathered(region, volume.scan(index), frame, resolution) for index, region in zip(edited, regions, strict=True)
    ]


def preserve(mask: np.ndarray | None, scan: Scan, values: np.ndarray) -> np.ndarray:
    """Real values `(H,W)` of a picture, with the scan's where `mask` is 1."""
    return values if mask is None else mask * scan.pixels.astype(np.float32) + (1 - mask) * values


def _feathered(region: np.ndarray, scan: Scan, frame: Frame, resolution: int) -> np.ndarray:
    """1 in the region `(H,W)`, falling to 0 over `FEATHER` outside it."""
    if not region.any():
        return np.zeros(region.shape, np.float32)
    distance = ndimage.distance_transform_edt(~region, sampling=scan.spacing_mm or (1.0, 1.0))
    return np.clip(1 - distance / (FEATHER * frame.field_of_view / resolution), 0, 1).astype(np.float32)
