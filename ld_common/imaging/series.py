"""Which DICOM images make a series, which of them are left out, and how they lie."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.orientations import io_orientation

from ld_common.imaging.dicom import read_dicom, read_frames
from ld_common.imaging.dicom_header import DicomHeader
from ld_common.imaging.rejection import MAX_PIXELS, Rejection, ScanRejected, slice_number

UNEVEN = 0.02
"""Tolerance of a slice's position, as a share of the distance between slices."""
ONE_PLACE = 0.1
"""Images lie at one position where they are nearer than this share of the usual distance."""
SHOWN_CHOICES = 4


@dataclass(frozen=True, eq=False)
class Series:
    """Images of one acquisition, in the order of their positions along the normal."""

    headers: list[DicomHeader]
    left_out: list[DicomHeader]
    """Images whose plane is another one, such as a scout line."""

    @functools.cached_property
    def plane_axis(self) -> int | None:
        """Axis of the body (0 left to right, 1 back to front, 2 upwards) along which the slices are stacked."""
        affine = self.headers[0].affine
        return None if affine is None else int(io_orientation(affine)[2, 0])

    @property
    def is_mixed(self) -> bool:
        """Whether no plane is that of most images, so that this one was chosen by the plane that was asked for."""
        return len(self.headers) <= len(self.left_out)

    @property
    def step_mm(self) -> float:
        """Distance between neighbouring slices; 0 of a single one."""
        first, last = (self.headers[place].position_mm or 0.0 for place in (0, -1))
        return (last - first) / max(1, len(self.headers) - 1)

    def check_whole(self, path: Path) -> None:
        """Raise `ScanRejected` where images are left out: a reader of one series drops none silently."""
        if self.left_out:
            count = len(self.left_out)
            detail = f"{count} of its images have another orientation or spacing than the others: take them out"
            raise ScanRejected(path, Rejection.WRONG_GEOMETRY, detail)

    def at(self, path: Path, fraction: float, index: int | None = None) -> DicomHeader:
        """The image at `fraction` (0 to 1), or at `index`, counted to the right, to the front or upwards.

        Raises:
            ScanRejected: no image has that index.
        """
        affine = self.headers[0].affine
        forward = affine is None or io_orientation(affine)[2, 1] > 0
        chosen = slice_number(path, len(self.headers), fraction, index)
        return self.headers[chosen if forward else len(self.headers) - 1 - chosen]


def grouped(headers: Sequence[DicomHeader]) -> list[list[DicomHeader]]:
    """Images by series and patient, in the order of first appearance.

    Some scanners give every slice a Series Instance UID of its own: such images belong together where patient, study,
    series number and description are the same, unless all of them lie at one position.
    """
    by_uid: dict[tuple[str, ...], list[DicomHeader]] = defaultdict(list)
    for header in headers:
        by_uid[header.series_uid or str(header.path), header.patient_id].append(header)
    together: dict[tuple[str, ...], list[DicomHeader]] = defaultdict(list)
    for key, images in by_uid.items():
        first = images[0]
        alone = len(images) == 1 and first.study_uid and first.affine is not None
        shared = (first.study_uid, first.patient_id, str(first.series_number), first.series_description)
        together[("", *shared) if alone else ("uid", *key)] += images
    groups: list[list[DicomHeader]] = []
    for images in together.values():
        positions = {round(header.position_mm or 0.0, 3) for header in images}
        one = len({header.series_uid for header in images}) == 1 or len(positions) > 1
        groups += [images] if one else [[header] for header in images]
    return groups


def ordered(path: Path, headers: Sequence[DicomHeader], axis: int | None = None) -> Series:
    """The images of one series by position, in the plane that most of them have; copies of an image count once.

    Args:
        path: what is named where they are no series.
        headers: of the images.
        axis: of the body, as `Series.plane_axis`. Where a file holds several planes and none has most of the images,
            the one stack along this axis is taken.

    Raises:
        ScanRejected: images have no place, lie at one position, have no common plane, or one of them is missing.
    """
    copies = {(one.sop_uid or str(one.path), one.frame, one.position_mm): one for one in headers}
    unique = list(copies.values())
    if len(unique) == 1:
        return Series(unique, [])
    if any(header.position_mm is None for header in unique):
        detail = "a slice has no usable position, orientation or spacing: the series cannot be sorted"
        raise ScanRejected(path, Rejection.WRONG_GEOMETRY, detail)
    planes = _by_plane(unique)
    chosen = max(planes, key=len)
    if 2 * len(chosen) <= len(unique):
        chosen = _asked_for(path, planes, axis)
    images = sorted(chosen, key=lambda header: (header.position_mm or 0.0, header.sop_uid))
    if len(images) > 1:
        _check_positions(path, images)
    return Series(images, [header for plane in planes if plane is not chosen for header in plane])


def read_voxels_of(path: Path, series: Series, modalities: Sequence[str], released: bool) -> np.ndarray:
    """Real values of all slices, float32 `(column,row,slice)`, the first axis fastest.

    Raises:
        ScanRejected: an image cannot be read, has another size than the first, or there are too many voxels.
    """
    voxels = np.empty((0, 0, 0), np.float32)
    frames: dict[Path, list[np.ndarray]] = {}
    for number, header in enumerate(series.headers):
        if header.frame is None:
            pixels = read_dicom(header.path, modalities, released)[1]
        else:
            if header.path not in frames:
                frames[header.path] = read_frames(header.path, modalities, released)[1]
            pixels = frames[header.path][header.frame]
        if number == 0:
            if pixels.size * len(series.headers) > MAX_PIXELS:
                raise ScanRejected(path, Rejection.TOO_LARGE, f"more than the {MAX_PIXELS} voxels that are read")
            voxels = np.empty((*pixels.T.shape, len(series.headers)), np.float32, order="F")
        if pixels.T.shape != voxels.shape[:2]:
            raise ScanRejected(path, Rejection.WRONG_GEOMETRY, "its slices have several sizes")
        voxels[:, :, number] = pixels.T
    return voxels


def affine_of(path: Path, series: Series) -> np.ndarray:
    """`(4,4)` of the stacked slices: (column, row, slice, 1) -> millimetres to the right, to the front, up.

    Raises:
        ScanRejected: there is one slice, or they are shifted sideways.
    """
    placed = [header.affine for header in series.headers if header.affine is not None]
    if len(placed) < 2:
        raise ScanRejected(path, Rejection.WRONG_GEOMETRY, "one slice is not a volume")
    affine = placed[0].copy()
    step = (placed[-1][:3, 3] - placed[0][:3, 3]) / (len(placed) - 1)
    if abs(affine[:3, 2] @ step) < (1 - UNEVEN**2) * float(np.linalg.norm(step)):
        raise ScanRejected(path, Rejection.WRONG_GEOMETRY, "its slices are shifted sideways (tilted): resample them")
    affine[:3, 2] = step
    return affine


def _by_plane(headers: Sequence[DicomHeader]) -> list[list[DicomHeader]]:
    """Images by orientation and spacing, in the order of their first images; those without a place are in none."""
    placed = [header for header in headers if header.affine is not None]
    directions = np.array([header.affine[:3, :3] for header in placed if header.affine is not None])
    planes: list[list[DicomHeader]] = []
    waiting = np.arange(len(placed))
    while len(waiting):
        same = np.isclose(directions[waiting[0]], directions[waiting], atol=1e-2).all((1, 2))
        planes.append([placed[place] for place in waiting[same]])
        waiting = waiting[~same]
    return planes


def _asked_for(path: Path, planes: Sequence[list[DicomHeader]], axis: int | None) -> list[DicomHeader]:
    """The one stack along an axis among the planes of one file; raises `ScanRejected` where there is none."""
    one_file = len({header.path for plane in planes for header in plane}) == 1
    stacks = [plane for plane in planes if len(plane) > 1 and Series(plane, []).plane_axis == axis]
    if one_file and len(stacks) == 1:
        return stacks[0]
    counts = " and ".join(str(len(plane)) for plane in planes)
    remedy = "write each as a file of its own" if one_file else "give each a folder of its own"
    detail = f"its slices have several orientations or spacings, {counts} images: {remedy}"
    raise ScanRejected(path, Rejection.WRONG_GEOMETRY, detail)


def _check_positions(path: Path, images: Sequence[DicomHeader]) -> None:
    positions = np.array([header.position_mm for header in images])
    gaps = np.diff(positions)
    step = float(positions[-1] - positions[0]) / (len(images) - 1)
    usual = float(np.median(gaps[gaps > 1e-3])) if (gaps > 1e-3).any() else 0.0
    if step < 1e-3 or gaps.min() < ONE_PLACE * usual:
        raise ScanRejected(path, Rejection.SEVERAL_AT_ONE_PLACE, _choices(images))
    even = positions[0] + np.arange(len(images)) * step
    if np.abs(positions - even).max() > UNEVEN * step:
        detail = (
            f"its slices are {gaps.min():.4g} to {gaps.max():.4g} mm apart: one is missing, or this is not one volume"
        )
        raise ScanRejected(path, Rejection.MISSING_SLICE, detail)


def _choices(images: Sequence[DicomHeader]) -> str:
    """What tells images at one position apart, so that a person can choose."""
    kinds = {
        "echo": {f"{header.echo_ms:g} ms" for header in images if header.echo_ms is not None},
        "type": {header.image_type for header in images if header.image_type},
        "": {header.time_point for header in images if header.time_point},
    }
    found = []
    for kind, values in kinds.items():
        if len(values) > 1:
            more = " and more" if len(values) > SHOWN_CHOICES else ""
            found.append(f"{kind} {'; '.join(sorted(values)[:SHOWN_CHOICES])}{more}".strip())
    told = f" ({'; '.join(found)})" if found else ""
    return f"several images at one position{told}: keep one of each, in a site's config by data.series"
