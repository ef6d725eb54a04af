"""Which head volumes seem to show a face."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from ld_common.imaging.face import shows_face
from ld_common.imaging.volume import Volume
from tests.support.heads import SHAPE, SPACING_MM, head

COLIN27 = Path("/usr/share/mricron/templates")
"""Debian's package mricron-data."""


def volume(voxels: np.ndarray) -> Volume:
    return Volume(voxels, np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0]), {}, None)


@pytest.mark.parametrize("degrees", [-10, 0, 10])
def test_a_face_is_seen_at_several_tilts(degrees: float) -> None:
    assert shows_face(volume(ndimage.rotate(head(), degrees, axes=(1, 2), reshape=False, order=1))) is True


@pytest.mark.parametrize(("face", "skull"), [(False, True), (False, False)])
def test_a_head_without_face_or_skull_shows_none(face: bool, skull: bool) -> None:
    assert shows_face(volume(head(face, skull))) is False


def test_a_cut_in_front_of_eyes_and_nose_removes_the_face() -> None:
    voxels = head()
    voxels[:, 55:, :50] = 0  # what a defacing tool leaves: constant, in front and below
    assert shows_face(volume(voxels)) is False


def test_the_order_of_the_axes_does_not_matter() -> None:
    turned = Volume(head().transpose(2, 0, 1)[:, ::-1], np.eye(4), {}, None)
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = SPACING_MM, -SPACING_MM, SPACING_MM, 1
    assert shows_face(Volume(turned.voxels, affine, {}, None)) is True


def test_a_volume_that_does_not_reach_the_face_or_shows_no_head_is_not_judged() -> None:
    assert shows_face(volume(head(lowest_mm=120))) is None
    assert shows_face(volume(np.zeros(SHAPE, np.float32))) is None
    assert shows_face(volume(head()[::4])) is None


@pytest.mark.skipif(not COLIN27.is_dir(), reason="Debian's mricron-data is not installed")
@pytest.mark.parametrize(("name", "expected"), [("ch2", True), ("ch2bet", False)])
def test_a_real_head_and_its_brain_are_told_apart(name: str, expected: bool) -> None:
    image = nibabel.load(COLIN27 / f"{name}.nii.gz")
    assert shows_face(Volume(np.asarray(image.dataobj, np.float32), image.affine, {}, None)) is expected
