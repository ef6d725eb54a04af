"""What `ld-generate` is asked: inputs, what they show, and what should be different."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ld_common.core.errors import RequestError, ScanError
from ld_common.imaging.geometry import Frame, Scan, to_model
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.scan_reader import read_scan
from ld_common.imaging.scan_table import agree, shown
from ld_generate.attribute_sweep import Sweep
from ld_generate.preserve_mask import read_mask
from ld_generate.samples import make_folder
from ld_generate.watermark import check_room

SUFFIXES = (".nii.gz", ".nii", ".dcm", ".png")
MIN_SIDE = 16
"""Fewest rows and columns of a scan: below, it is an icon."""


@dataclass(frozen=True)
class EditRequest:
    """One input: its scan in the model's frame, what it shows, and what is asked of it."""

    path: Path
    scan: Scan
    frame: Frame
    image: Tensor
    """`(1,S,S)` in [-1, 1]."""
    factual: Attributes
    targets: list[Attributes]
    """The changed attributes of each `--set`."""
    slice_index: int | None
    """The slice that was asked for; None is the one that training used."""
    folder: Path
    trajectory: Sweep | None = None
    """Its targets are the last of `targets`."""
    kept: np.ndarray | None = None
    """How much of each pixel `(H,W)` stays the scan's, from 0 to 1; None edits all of it."""
    mark: bool = False
    """Whether the word synthetic is written into the pixels of the answers."""


def read_requests(
    modality: Modality,
    side: int,
    inputs: Sequence[Path],
    targets: list[Attributes],
    given: Attributes,
    slice_index: int | None,
    released: bool,
    out: Path,
    trajectory: Sweep | None = None,
    mask: Path | None = None,
    mark: bool = False,
) -> list[EditRequest]:
    """Read the inputs and settle what each shows; raises `ScanError` or `RequestError`."""
    asked, questions = [*targets, *(trajectory.targets if trajectory else [])], []
    for path, name in zip(inputs, folder_names(inputs), strict=True):
        scan = read_scan(path, modality, slice_index, released)
        if mark:
            check_room(*scan.pixels.shape)
        image, frame = picture_of(path, scan, side, modality)
        factual = factual_of(modality, path, scan.attributes_in_file, given)
        kept = None if mask is None else read_mask(mask, modality, slice_index, scan, frame, side)
        folder = out / name
        questions.append(
            EditRequest(path, scan, frame, image, factual, asked, slice_index, folder, trajectory, kept, mark)
        )
    return questions


def picture_of(path: Path, scan: Scan, side: int, modality: Modality) -> tuple[Tensor, Frame]:
    """The model's picture of a scan, as `to_model`; raises `ScanError` for one that shows nothing."""
    height, width = scan.pixels.shape
    if min(height, width) < MIN_SIDE:
        raise ScanError(f"cannot use '{path}': {height} x {width} pixels, at least {MIN_SIDE} x {MIN_SIDE} are needed")
    try:
        return to_model(scan, side, modality.image)
    except ScanError as error:
        raise ScanError(f"cannot use '{path}': {error}") from error


def folder_names(inputs: Sequence[Path]) -> list[str]:
    """A name of its own for each input's results; `series` of many patients are told apart by the folder above."""
    own = [
        next((path.name.removesuffix(end) for end in SUFFIXES if path.name.endswith(end)), path.name) for path in inputs
    ]
    names: list[str] = []
    for path, name in zip(inputs, own, strict=True):
        name = f"{path.resolve().parent.name}_{name}" if own.count(name) > 1 else name
        while name in names:
            name += "_"
        names.append(name)
    return names


def make_folders(questions: Sequence[EditRequest]) -> None:
    """Make the folders before anything is drawn; raises `RequestError` when one cannot be."""
    for question in questions:
        make_folder(question.folder)


def read_target(modality: Modality, text: str) -> Attributes:
    """What one `--set` changes; raises `RequestError`."""
    target = modality.parse_all(text)
    if not target:
        raise RequestError(f"--set '{text}' changes nothing: give attribute=value")
    return target


def factual_of(modality: Modality, path: Path, in_file: Attributes, given: Attributes) -> Attributes:
    """What a scan shows, by its file and by `--given`; raises `RequestError` where they differ or say too little."""
    for name in sorted(set(in_file) & set(given)):
        if not agree(in_file[name], given[name]):
            raise RequestError(f"{name} is {shown(in_file[name])} in '{path}' and {shown(given[name])} in --given")
    factual = {name: value for name, value in (in_file | given).items() if name in modality.attributes}
    missing = [name for name in modality.attributes if name not in factual]
    if missing:
        raise RequestError(f"'{path}' does not say {', '.join(missing)}: add --given {'=...,'.join(missing)}=...")
    return factual
