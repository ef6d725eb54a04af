"""Edits of whole volumes: the slices that a release was trained on change, all others stay as they are.

The change enters the scan's own values, as `rendering` says. A deformation is smooth through the slices, and falls off
over the slices beyond the edited ones, so that no plane shows where the edit ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import BaseModel
from ld_common.diffusion.unfamiliarity import Unfamiliarity
from ld_common.editing.base import Editor
from ld_common.editing.counterfactuals import draw_counterfactuals, edit_to, past_of
from ld_common.editing.familiarity import unfamiliarity_of, unfamiliarity_warnings
from ld_common.imaging.geometry import Frame, to_model
from ld_common.imaging.modality import DEFORMATION, Attributes, Modality
from ld_common.imaging.readers import read_volume
from ld_common.imaging.rejection import slice_number
from ld_common.imaging.rendering import deform, displacement, render
from ld_common.imaging.volume import Volume
from ld_common.release.release import Release, edit_drift
from ld_generate.doubts import refuse_doubts
from ld_generate.options import read_slice_range
from ld_generate.preserve_mask import read_preserve_mask_volume
from ld_generate.request import RequestOptions, check_geometry, folder_names, model_picture, source_of
from ld_generate.volume_history import VolumeHistory, read_volume_history
from ld_generate.watermark import check_watermark_fits, draw_watermark

FALLOFF_MM = 12.0
"""Distance beyond the edited slices at which a deformation has fallen to nothing."""
SLICE_SMOOTHING_MM = 2.0
"""Standard deviation of a deformation's smoothing through the slices."""
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
    changed: range
    """Those whose values change: the edited ones, and those over which a deformation falls off."""
    source: Attributes
    """All attributes of the scan."""
    targets: list[Attributes]
    """The changed attributes of each counterfactual."""
    folder: Path
    preserve_masks: list[np.ndarray] | None
    """For each changed slice the share of the scan in each pixel `(H,W)`; None edits all of it."""
    watermark: bool
    rendering: str
    keep_geometry: bool = False
    unfamiliarity: Unfamiliarity | None = None
    """Of the slice that releases are trained on, as in `EditRequest`."""
    history: VolumeHistory | None = None
    """Earlier volumes of the patient."""

    @property
    def unfamiliarity_warnings(self) -> list[str]:
        """A sentence for each volume whose trained slice is unlike the sites' scans."""
        return unfamiliarity_warnings(self.unfamiliarity, () if self.history is None else self.history.unfamiliarity)


def read_volume_requests(
    base: BaseModel,
    release: Release,
    inputs: Sequence[Path],
    targets: list[Attributes],
    options: RequestOptions,
    slices: str,
) -> list[VolumeEditRequest]:
    """Read volumes and determine their attributes, as `read_requests` does for scans.

    Args:
        base: the base with the release's adapter.
        release: the release.
        inputs: NIfTI files, or folders of a DICOM series.
        targets: the changed attributes of each counterfactual.
        options: all else.
        slices: `first:last`; empty for those near the slice that the release was trained on.

    Raises:
        ScanError, RequestError: as `read_requests`; also slices that do not exist, and a watermark for a series whose
            slices are not axial.
    """
    modality, resolution, requests = release.modality, base.resolution, []
    for path, name in zip(inputs, folder_names(inputs), strict=True):
        volume = read_volume(path, modality, options.burned_in_text_checked)
        if options.watermark and volume.header is None and not volume.axial:
            raise RequestError(f"--watermark needs axial slices, those of '{path}' are not: leave it out")
        if options.watermark:
            check_watermark_fits(*volume.upright.shape[1:])
        if options.keep_geometry:
            check_geometry(path, volume.frame_of_reference)
        count, position = len(volume.upright), modality.image.slice_position
        edited = choose_slices(path, slices, count) if slices else slices_around(count, position)
        rendering = options.rendering or modality.image.rendering
        changed = _with_falloff(volume, edited) if rendering == DEFORMATION else edited
        trained = volume.scan(slice_number(path, count, position, None))
        picture, window = model_picture(path, trained, resolution, modality)
        masks = None
        if options.preserve_mask is not None:
            masks = read_preserve_mask_volume(options.preserve_mask, modality, volume, changed, window, resolution)
        source = source_of(modality, path, volume.attributes_in_file, options.source)
        request = VolumeEditRequest(
            path=path,
            volume=volume,
            window=window,
            edited=edited,
            changed=changed,
            source=source,
            targets=targets,
            folder=options.out / name,
            preserve_masks=masks,
            watermark=options.watermark,
            rendering=rendering,
            keep_geometry=options.keep_geometry,
            unfamiliarity=unfamiliarity_of(base, release.drift, modality, picture, source),
            history=read_volume_history(base, release, volume, edited, window, source, options),
        )
        if options.strict:
            further = request.unfamiliarity_warnings + extrapolated_slices(modality, request)
            refuse_doubts(release, path, [source, *targets], further)
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


def extrapolated_slices(modality: Modality, request: VolumeEditRequest) -> list[str]:
    """A warning where edited slices lie further from the trained one than those edited by default."""
    default = slices_around(len(request.volume.upright), modality.image.slice_position)
    if set(request.edited) <= set(default):
        return []
    return [
        f"slices {request.edited[0]} to {request.edited[-1]}: the release was trained on slices like {default[0]} to "
        f"{default[-1]}, others are extrapolated"
    ]


def _with_falloff(volume: Volume, edited: range) -> range:
    reach = math.ceil(FALLOFF_MM / volume.slice_mm) - 1
    return range(max(0, edited[0] - reach), min(len(volume.upright), edited[-1] + reach + 1))


def draw_volume(
    base: BaseModel,
    release: Release,
    request: VolumeEditRequest,
    editor: Editor,
    progress: Callable[[int], None],
) -> list[Volume]:
    """The volume under each target; slices that do not change keep the input's values.

    All slices get the same noise. The model holds at most one batch of them at a time. With a history, one factor
    scales the change of all slices.
    """
    prompt = release.modality.prompt(request.source)
    volumes = [request.volume.copied() for _ in request.targets]
    fields: list[list[np.ndarray]] = [[] for _ in volumes]
    drift, seed = edit_drift(release), release.study.seed
    slices = () if request.history is None else request.history.slices
    past = past_of(release.modality, dict(enumerate(slices)), one_volume=True)
    together = editor.batch_size if past is None else len(request.edited)
    for first in range(0, len(request.edited), together):
        rows = range(len(request.edited))[first : first + together]
        pictures = torch.stack([_picture(request, row, base.resolution, release.modality) for row in rows])
        edits = [
            edit_to(release.modality, scan, request.source, target, editor.delta)
            for target in request.targets
            for scan in range(len(rows))
        ]
        drawn = draw_counterfactuals(base, pictures, [prompt] * len(rows), edits, editor, progress, drift, seed, past)
        for number, images in enumerate(drawn.images.split(len(rows))):
            for row, image, reconstruction in zip(rows, images, drawn.reconstructions, strict=True):
                if request.rendering == DEFORMATION:
                    fields[number].append(displacement(reconstruction, image))
                else:
                    index = request.edited[row]
                    original = request.volume.upright[index]
                    values = render(original, request.window, reconstruction, image, request.rendering)
                    volumes[number].upright[index] = _finished(request, index, values)
    if request.rendering == DEFORMATION:
        for volume, field in zip(volumes, fields, strict=True):
            _deform(request, volume, np.stack(field))
    return volumes


def _deform(request: VolumeEditRequest, volume: Volume, field: np.ndarray) -> None:
    """Move the changed slices by the displacements of the edited ones `(N,2,S,S)`."""
    slice_mm, edited = request.volume.slice_mm, request.edited
    smooth = ndimage.gaussian_filter1d(field, SLICE_SMOOTHING_MM / slice_mm, axis=0, mode="nearest")
    for index in request.changed:
        nearest = min(max(index, edited[0]), edited[-1])
        beyond_mm = abs(index - nearest) * slice_mm
        share = (1 + math.cos(math.pi * beyond_mm / FALLOFF_MM)) / 2
        values = deform(request.volume.upright[index], request.window, share * smooth[nearest - edited[0]])
        volume.upright[index] = _finished(request, index, values)


def _picture(request: VolumeEditRequest, row: int, resolution: int, modality: Modality) -> Tensor:
    scan = request.volume.scan(request.edited[row])
    return to_model(scan, resolution, modality.image, request.window)[0]


def _finished(request: VolumeEditRequest, index: int, values: np.ndarray) -> np.ndarray:
    """New values `(H,W)` of a slice: the scan's where it is preserved, clipped to the window, marked."""
    original, window = request.volume.upright[index], request.window
    if request.preserve_masks is not None:
        share = request.preserve_masks[index - request.changed[0]]
        values = share * original + (1 - share) * values
    values = np.clip(values, np.minimum(original, window.low), np.maximum(original, window.high))
    return draw_watermark(values, window.low, window.high) if request.watermark else values
