"""Whole volumes: `ld-generate --volume` edits the slices that a release knows and leaves the others as they are.

A picture of the model is coarser than most scans, so a slice that was simply replaced would be blurred beside its
neighbours. What is written is the scan with the drawn change: the answer less the reconstruction, in the scan's grid.
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
from ld_common.imaging.geometry import Frame, from_model, to_model
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.rejection import slice_number
from ld_common.imaging.volume import Volume, read_volume
from ld_common.release.release import Release, edit_drift
from ld_generate.preserve_mask import read_mask_volume
from ld_generate.request import factual_of, folder_names, picture_of
from ld_generate.watermark import check_room, mark

REACH = 0.025
"""Share of a volume, on either side of the slice that releases are trained on, that is edited by default."""


@dataclass(frozen=True, eq=False)
class VolumeEditRequest:
    """One input: its volume, what it shows, and what is asked of which of its slices."""

    path: Path
    volume: Volume
    window: Frame
    """The frame of the slice that releases are trained on: one range of grey for all slices, so that none flickers."""
    edited: range
    """The axial slices that are drawn anew, counted from 0, the lowest."""
    factual: Attributes
    targets: list[Attributes]
    folder: Path
    kept: list[np.ndarray] | None
    """How much of each edited slice's pixels `(H,W)` stays the scan's; None edits all of it."""
    mark: bool


def read_volume_requests(
    modality: Modality,
    side: int,
    inputs: Sequence[Path],
    targets: list[Attributes],
    given: Attributes,
    slices: str,
    released: bool,
    out: Path,
    mask: Path | None,
    marked: bool,
) -> list[VolumeEditRequest]:
    """As `read_requests`, of volumes; `slices` is `first:last`, or empty for those about the trained one.

    Raises:
        ScanError, RequestError: as there; also a series whose slices are not axial and shall be marked.
    """
    questions = []
    for path, name in zip(inputs, folder_names(inputs), strict=True):
        volume = read_volume(path, modality, released)
        if marked and volume.source is None and not volume.axial:
            raise RequestError(f"--mark is written into axial slices, and '{path}' has others: leave it out")
        if marked:
            check_room(*volume.upright.shape[1:])
        count, position = len(volume.upright), modality.image.slice_position
        edited = read_slices(path, slices, count) if slices else slices_about(count, position)
        trained = volume.scan(slice_number(path, count, position, None))
        window = picture_of(path, trained, side, modality)[1]
        factual = factual_of(modality, path, volume.attributes_in_file, given)
        kept = None if mask is None else read_mask_volume(mask, modality, volume, edited, window, side)
        questions.append(VolumeEditRequest(path, volume, window, edited, factual, targets, out / name, kept, marked))
    return questions


def read_slices(path: Path, text: str, count: int) -> range:
    """`first:last`, the last one included, of a volume of `count` slices; raises `RequestError`."""
    first, _, last = text.partition(":")
    if not (first.strip().isdecimal() and last.strip().isdecimal()):
        raise RequestError(f"--slices '{text}' is not of the form first:last, two numbers from 0")
    found = range(int(first), int(last) + 1)
    if not found or found[-1] >= count:
        raise RequestError(f"--slices '{text}': '{path}' has the slices 0:{count - 1}, from the lowest upwards")
    return found


def slices_about(count: int, position: float) -> range:
    """The slices within `REACH` of the one at `position`, itself always among them."""
    middle, reach = position * (count - 1), REACH * (count - 1)
    trained = math.floor(middle + 0.5)
    first, last = max(math.ceil(middle - reach), 0), min(math.floor(middle + reach), count - 1)
    return range(min(first, trained), max(last, trained) + 1)


def draw_volume(
    base: BaseModel,
    release: Release,
    question: VolumeEditRequest,
    editor: Editor,
    progress: Callable[[int], None],
) -> list[Volume]:
    """The volume under each target; every slice that is not edited has the input's own values.

    Methods that draw noise give all slices the same. No more of them are in the model at once than a batch holds.
    """
    factual = release.modality.prompt(question.factual)
    answers = [question.volume.copied() for _ in question.targets]
    drift, seed = edit_drift(release), release.study.seed
    for first in range(0, len(question.edited), editor.batch_size):
        rows = range(len(question.edited))[first : first + editor.batch_size]
        pictures = torch.stack([_picture(question, row, base.resolution, release.modality) for row in rows])
        edits = [
            edit_to(release.modality, place, question.factual, target, editor.delta)
            for target in question.targets
            for place in range(len(rows))
        ]
        drawn = draw_counterfactuals(base, pictures, [factual] * len(rows), edits, editor, progress, drift, seed)
        for answer, images in zip(answers, drawn.images.split(len(rows)), strict=True):
            for row, image, restored in zip(rows, images, drawn.reconstructions, strict=True):
                answer.upright[question.edited[row]] = _changed(question, row, image, restored)
    return answers


def _picture(question: VolumeEditRequest, row: int, side: int, modality: Modality) -> Tensor:
    scan = question.volume.scan(question.edited[row])
    return to_model(scan, side, modality.image, question.window)[0]


def _changed(question: VolumeEditRequest, row: int, image: Tensor, restored: Tensor) -> np.ndarray:
    """An edited slice `(H,W)`: the scan's, changed as `image` differs from `restored`, within the window."""
    own, window = question.volume.upright[question.edited[row]], question.window
    change = from_model(image, window) - from_model(restored, window)  # 0 outside the field of view
    if question.kept is not None:
        change *= 1 - question.kept[row]
    values = np.clip(own + change, np.minimum(own, window.low), np.maximum(own, window.high))
    return mark(values, window.low, window.high) if question.mark else values
