"""A patient's earlier volumes: for each edited slice of a volume, the slice of the same place in each of them.

Places are distances from the slice that releases are trained on, along the slices' normal. Nothing is registered here:
the volumes must show the patient in the same position, as rigid registration makes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import BaseModel
from ld_common.diffusion.unfamiliarity import Unfamiliarity
from ld_common.editing.familiarity import history_unfamiliarity
from ld_common.editing.history import EarlierScan, ScanHistory, Write, visit_times, writing
from ld_common.imaging.geometry import Frame, Scan, to_model
from ld_common.imaging.modality import AGE, Attributes, ImageConfig
from ld_common.imaging.readers import read_volume
from ld_common.imaging.rejection import slice_number
from ld_common.imaging.volume import Volume
from ld_common.release.release import Release
from ld_generate.request import RequestOptions, model_picture

MAX_SPACING_RATIO = 2.0
"""Of the spacing of two volumes, in any direction: a slice of one then holds what several of the other do."""
MAX_HEIGHT_RATIO = 1.1
"""Of what two volumes cover from bottom to top: the trained slice, a share of it, else lies elsewhere in the body."""
MAX_TILT_DEGREES = 15.0
"""Between the axes of two volumes."""
REGISTER = "register it rigidly to the scan and resample it to the scan's grid"


@dataclass(frozen=True, eq=False)
class VolumeHistory:
    """Earlier volumes of a volume's patient, the first visit first."""

    slices: Sequence[ScanHistory]
    """Of each edited slice."""
    places: Sequence[np.ndarray]
    """For each earlier volume, where the edited slices lie in it, counted in its slices from the lowest."""
    unfamiliarity: Sequence[Unfamiliarity]
    """How unlike the sites' scans the trained slice of each is; empty where the release cannot tell."""


def read_volume_history(
    base: BaseModel,
    release: Release,
    volume: Volume,
    edited: range,
    window: Frame,
    source: Attributes,
    options: RequestOptions,
) -> VolumeHistory | None:
    """Read the earlier volumes of `options.history`; None without any.

    Args:
        base: the base, whose resolution the pictures have.
        release: the release.
        volume: the volume that is edited.
        edited: its edited slices.
        window: its grey range.
        source: its attributes.
        options: the command's.

    Raises:
        RequestError: another patient's volume, one that is not earlier, whose time is not known, or whose geometry does
            not fit.
        ScanError: a file that cannot be used.
    """
    if not options.history:
        return None
    modality, resolution = release.modality, base.resolution
    if AGE not in source:
        raise RequestError(f"a history needs the attribute {AGE}, which {modality.name} lacks")
    image, visits = modality.image, []
    for file in options.history:
        earlier = read_volume(file.path, modality, options.burned_in_text_checked)
        places = (  # volumes on a template's grid have their slices in the same places
            np.array(edited, np.float64)
            if modality.registers
            else matching_places(file.path, volume, earlier, edited, image.slice_position)
        )
        trained = earlier.scan(slice_number(file.path, len(earlier.upright), image.slice_position, None))
        picture, own_window = model_picture(file.path, trained, resolution, modality)
        visit = EarlierScan(trained, file.age, f"'{file.path}'")
        (years,) = visit_times(volume.scan(edited[0]), float(source[AGE]), [visit])
        pictures = [to_model(slice_at(earlier, place), resolution, image, own_window)[0] for place in places]
        visits.append((years, places, picture, torch.stack(pictures)))
    visits.sort(key=lambda visit: -visit[0])
    times = [years for years, *_ in visits]
    written_as = options.rendering or image.rendering
    slices = []
    for row, index in enumerate(edited):
        history = ScanHistory(torch.stack([pictures[row] for *_, pictures in visits]), times)
        slices.append(replace(history, write=_writing(volume, index, window, written_as, resolution, image)))
    of_trained = ScanHistory(torch.stack([picture for _, _, picture, _ in visits]), times)
    unlike = history_unfamiliarity(base, release.drift, modality, of_trained, source)
    return VolumeHistory(slices, [places for _, places, *_ in visits], unlike)


def matching_places(path: Path, volume: Volume, earlier: Volume, edited: range, position: float) -> np.ndarray:
    """Where the edited slices of a volume lie in an earlier one, counted in its slices from the lowest, `(N,)`.

    Args:
        path: of the earlier volume, for messages.
        volume: the volume that is edited.
        earlier: the earlier volume.
        edited: slices of `volume`.
        position: of the slice that releases are trained on, as a share of a volume's slices.

    Raises:
        RequestError: the volumes' spacing, orientation or extent differ so much that their slices do not compare.
    """
    _check_geometry(path, volume, earlier)
    middle, own_middle = (slice_number(path, len(scan.upright), position, None) for scan in (volume, earlier))
    places: np.ndarray = own_middle + (np.array(edited) - middle) * (volume.slice_mm / earlier.slice_mm)
    last = len(earlier.upright) - 1
    if places.min() < -0.5 or places.max() > last + 0.5:
        raise RequestError(f"'{path}' does not reach all edited slices: edit fewer (--slices), or {REGISTER}")
    return places.clip(0, last)


def _check_geometry(path: Path, volume: Volume, earlier: Volume) -> None:
    scan, other = volume.scan(0), earlier.scan(0)
    assert scan.affine is not None and other.affine is not None
    spacing, own_spacing = (np.linalg.norm(affine[:3, :3], axis=0) for affine in (scan.affine, other.affine))
    ratio = float(np.exp(np.abs(np.log(spacing / own_spacing)).max()))
    if ratio > MAX_SPACING_RATIO:
        words, own_words = (" x ".join(f"{side:.3g}" for side in sides) for sides in (spacing, own_spacing))
        raise RequestError(
            f"'{path}' has voxels of {own_words} mm and the scan of {words} mm: their slices do not compare; {REGISTER}"
        )
    turn = (scan.affine[:3, :3] / spacing).T @ (other.affine[:3, :3] / own_spacing)
    degrees = math.degrees(math.acos(min(1.0, (float(np.trace(turn)) - 1) / 2)))
    if degrees > MAX_TILT_DEGREES:
        raise RequestError(f"the slices of '{path}' are turned by {degrees:.0f}° against the scan's: {REGISTER}")
    height, own_height = (len(each.upright) * each.slice_mm for each in (volume, earlier))
    if max(height / own_height, own_height / height) > MAX_HEIGHT_RATIO:
        raise RequestError(
            f"'{path}' covers {own_height:.0f} mm from bottom to top and the scan {height:.0f} mm, so their trained "
            f"slices lie elsewhere in the body: {REGISTER}"
        )


def slice_at(volume: Volume, place: float) -> Scan:
    """The axial slice at a place between two slices of a volume, interpolated linearly."""
    below = min(math.floor(place), len(volume.upright) - 1)
    scan, share = volume.scan(below), place - below
    if share < 1e-6:
        return scan
    return replace(scan, pixels=(1 - share) * scan.pixels + np.float32(share) * volume.upright[below + 1])


def _writing(volume: Volume, index: int, window: Frame, rendering: str, resolution: int, image: ImageConfig) -> Write:
    scan = volume.scan(index)
    return writing(scan, to_model(scan, resolution, image, window)[1], rendering, resolution, image)
