"""Edits of whole volumes: the slices that a release was trained on change, all others stay as they are.

The model's picture is coarser than most scans, so a slice that it replaced would look blurred beside its neighbours.
Therefore the change is added to the scan: counterfactual minus reconstruction, in the scan's grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import BaseModel
from ld_common.editing.base import Editor
from ld_common.editing.counterfactuals import draw_counterfactuals, edit_to
from ld_common.imaging.decoding_process import read_volume
from ld_common.imaging.geometry import Frame, from_model, to_model
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.rejection import slice_number
from ld_common.imaging.volume import Volume
from ld_common.release.release import Release, edit_drift
from ld_generate.options import read_slice_range
from ld_generate.preserve_mask import read_preserve_mask_volume
from ld_generate.request import RequestOptions, folder_names, model_picture, source_of
from ld_generate.watermark import check_watermark_fits, draw_watermark

REACH = 0.025
"""Share of a volume, on either side of the slice that releases are trained on, that is edited by default."""


@dataclass(frozen=True, eq=False)
class VolumeEditRequest:
    """A volume, what it shows, and what shall change in which slices."""

    path: Path
    volume: Volume
    window: Frame
    """Frame of the slice that releases are trained on; all slices have its grey range, so that none flickers."""
    edited: range
    """The axial slices that are edited, from 0, the lowest."""
    source: Attributes
    """All attributes of the scan."""
    targets: list[Attributes]
    """The changed attributes of each counterfactual."""
    folder: Path
    preserve_masks: list[np.ndarray] | None
    """For each edited slice the share of the scan in each pixel `(H,W)`; None edits all of it."""
    watermark: bool


def read_volume_requests(
    modality: Modality,
    resolution: int,
    inputs: Sequence[Path],
    targets: list[Attributes],
    options: RequestOptions,
    slices: str,
) -> list[VolumeEditRequest]:
    """Read volumes and determine their attributes, as `read_requests` does for scans.

    Args:
        modality: the release's.
        resolution: side of the model's picture, in pixels.
        inputs: NIfTI files, or folders of a DICOM series.
        targets: the changed attributes of each counterfactual.
        options: all else.
        slices: `first:last`; empty for those near the slice that the release was trained on.

    Raises:
        ScanError, RequestError: as `read_requests`; also slices that do not exist, and a watermark for a series whose
            slices are not axial.
    """
    requests = []
    for path, name in zip(inputs, folder_names(inputs), strict=True):
        volume = read_volume(path, modality, options.burned_in_text_checked)
        if options.watermark and volume.header is None and not volume.axial:
            raise RequestError(f"--watermark needs axial slices, those of '{path}' are not: leave it out")
        if options.watermark:
            check_watermark_fits(*volume.upright.shape[1:])
        count, position = len(volume.upright), modality.image.slice_position
        edited = choose_slices(path, slices, count) if slices else slices_around(count, position)
        trained = volume.scan(slice_number(path, count, position, None))
        window = model_picture(path, trained, resolution, modality)[1]
        masks = None
        if options.preserve_mask is not None:
            masks = read_preserve_mask_volume(options.preserve_mask, modality, volume, edited, window, resolution)
        request = VolumeEditRequest(
            path=path,
            volume=volume,
            window=window,
            edited=edited,
            source=source_of(modality, path, volume.attributes_in_file, options.source),
            targets=targets,
            folder=options.out / name,
            preserve_masks=masks,
            watermark=options.watermark,
        )
        requests.append(request)
    return requests


def choose_slices(path: Path, text: str, count: int) -> range:
    """`first:last`, the last one included, of a volume with `count` slices; raises `RequestError`."""
    slices = read_slice_range(text)
    if slices[-1] >= count:
        raise RequestError(f"--slices '{text}': '{path}' has the slices 0:{count - 1}, from the lowest upwards")
    return slices


def slices_around(count: int, position: float) -> range:
    """The slices within `REACH` of the one at `position`, which is always among them."""
    middle, reach = position * (count - 1), REACH * (count - 1)
    trained = math.floor(middle + 0.5)
    first, last = max(math.ceil(middle - reach), 0), min(math.floor(middle + reach), count - 1)
    return range(min(first, trained), max(last, trained) + 1)


def draw_volume(
    base: BaseModel,
    release: Release,
    request: VolumeEditRequest,
    editor: Editor,
    progress: Callable[[int], None],
) -> list[Volume]:
    """The volume under each target; slices that are not edited keep the input's values.

    All slices get the same noise. The model holds at most one batch of them at a time.
    """
    prompt = release.modality.prompt(request.source)
    volumes = [request.volume.copied() for _ in request.targets]
    drift, seed = edit_drift(release), release.study.seed
    for first in range(0, len(request.edited), editor.batch_size):
        rows = range(len(request.edited))[first : first + editor.batch_size]
        pictures = torch.stack([_picture(request, row, base.resolution, release.modality) for row in rows])
        edits = [
            edit_to(release.modality, scan, request.source, target, editor.delta)
            for target in request.targets
            for scan in range(len(rows))
        ]
        drawn = draw_counterfactuals(base, pictures, [prompt] * len(rows), edits, editor, progress, drift, seed)
        for volume, images in zip(volumes, drawn.images.split(len(rows)), strict=True):
            for row, image, reconstruction in zip(rows, images, drawn.reconstructions, strict=True):
                volume.upright[request.edited[row]] = _edited_slice(request, row, image, reconstruction)
    return volumes


def _picture(request: VolumeEditRequest, row: int, resolution: int, modality: Modality) -> Tensor:
    scan = request.volume.scan(request.edited[row])
    return to_model(scan, resolution, modality.image, request.window)[0]


def _edited_slice(request: VolumeEditRequest, row: int, image: Tensor, reconstruction: Tensor) -> np.ndarray:
    """An edited slice `(H,W)`: the scan plus `image` minus `reconstruction`, clipped to the window."""
    original, window = request.volume.upright[request.edited[row]], request.window
    change = from_model(image, window) - from_model(reconstruction, window)  # 0 outside the field of view
    if request.preserve_masks is not None:
        change *= 1 - request.preserve_masks[row]
    values = np.clip(original + change, np.minimum(original, window.low), np.maximum(original, window.high))
    return draw_watermark(values, window.low, window.high) if request.watermark else values
