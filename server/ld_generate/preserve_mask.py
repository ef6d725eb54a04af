"""A region of a scan that an edit may not change: `ld-generate --mask`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ld_common.core.errors import RequestError
from ld_common.imaging.geometry import Frame, Scan, to_model
from ld_common.imaging.modality import Modality
from ld_common.imaging.scan_reader import read_scan
from ld_common.imaging.volume import Volume, check_same_grid, read_volume

FEATHER = 2.0
"""Pixels of the model's picture over which an edit fades in outside the region."""


def read_mask(
    path: Path, modality: Modality, slice_index: int | None, scan: Scan, frame: Frame, side: int
) -> np.ndarray:
    """How much of each pixel `(H,W)` is the scan's: 1 in the region, falling to 0 outside it.

    Args:
        path: an image of the scan's size, other than 0 in the region; a volume is cut as the scan's.
        modality: the scan's.
        slice_index: the scan's.
        scan: what is kept.
        frame: the scan's.
        side: of the model's picture.

    Raises:
        ScanError: it cannot be read.
        RequestError: it is of another size, or keeps nothing.
    """
    kept = read_scan(path, modality, slice_index).pixels != 0
    if kept.shape != scan.pixels.shape:
        raise RequestError(
            f"the mask '{path}' has {kept.shape[0]} x {kept.shape[1]} pixels, the scan {scan.pixels.shape[0]} x "
            f"{scan.pixels.shape[1]}: draw it on the input.png that ld-generate writes"
        )
    if not kept.any():
        raise RequestError(f"the mask '{path}' keeps nothing: it is 0 everywhere")
    return _faded(kept, scan, frame, side)


def read_mask_volume(
    path: Path, modality: Modality, volume: Volume, edited: range, frame: Frame, side: int
) -> list[np.ndarray]:
    """The same for each edited slice of a volume, whose voxels the mask's are.

    Raises:
        ScanError: it cannot be read, or has other voxels.
        RequestError: it keeps nothing of these slices.
    """
    mask = read_volume(path, modality)
    check_same_grid(path, mask, volume)
    slices = [mask.upright[index] != 0 for index in edited]
    if not any(kept.any() for kept in slices):
        raise RequestError(f"the mask '{path}' keeps nothing: it is 0 in all slices that are edited")
    return [_faded(kept, volume.scan(index), frame, side) for index, kept in zip(edited, slices, strict=True)]


def _faded(kept: np.ndarray, scan: Scan, frame: Frame, side: int) -> np.ndarray:
    """1 in the region `(H,W)`, falling to 0 outside it."""
    if not kept.any():
        return np.zeros(kept.shape, np.float32)
    apart = ndimage.distance_transform_edt(~kept, sampling=scan.spacing_mm or (1.0, 1.0))
    return np.clip(1 - apart / (FEATHER * frame.field_of_view / side), 0, 1).astype(np.float32)


def keep(kept: np.ndarray | None, scan: Scan, values: np.ndarray) -> np.ndarray:
    """An answer's real values `(H,W)` with the scan's own where they are kept."""
    return values if kept is None else kept * scan.pixels.astype(np.float32) + (1 - kept) * values


def keep_in_picture(kept: np.ndarray | None, scan: Scan, image: Tensor, answers: Tensor, modality: Modality) -> Tensor:
    """The same for the model's pictures: answers `(M,1,S,S)` with `image` `(1,S,S)` where it is kept."""
    if kept is None:
        return answers
    frame = Frame(0.0, 1.0, kept.shape, scan.spacing_mm, 0.0, None)
    share = (to_model(Scan(kept, scan.spacing_mm, {}), image.shape[-1], modality.image, frame)[0] + 1) / 2
    return torch.lerp(answers, image.expand_as(answers), share.expand_as(answers))
