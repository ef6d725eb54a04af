"""Whole heads and stripped brains are told apart, and a modality that names one refuses the other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ld_common.core.config import from_mapping
from ld_common.core.errors import ConfigError
from ld_common.imaging.geometry import Scan
from ld_common.imaging.head_kind import head_kind
from ld_common.imaging.modality import ImageConfig, Modality
from ld_common.imaging.readers import read_scan, read_volume
from ld_common.imaging.rejection import Rejection, ScanRejected
from ld_common.imaging.volume import Volume
from tests.support.prepared_heads import brain, write_volume

COLIN27 = Path("/usr/share/mricron/templates")
"""Debian's package mricron-data."""
OPEN_MS = Path(__file__).parents[3] / "shared/data/open_ms"
SLICES = (0.3, 0.4, 0.5, 0.6, 0.7)
HEADS = Modality(prompt_template="MRI", image=ImageConfig(part_mm=0, field_of_view_mm=0))


def kinds(image: nibabel.Nifti1Image) -> set[str | None]:
    volume = Volume(image.get_fdata(dtype=np.float32), image.affine, {}, None)
    return {head_kind(volume.scan(round(share * (len(volume.upright) - 1)))) for share in SLICES}


def with_head(kind: str) -> Modality:
    return dataclasses.replace(HEADS, image=dataclasses.replace(HEADS.image, head=kind))


@pytest.mark.parametrize(("scalp", "shown", "other"), [(True, "whole", "stripped"), (False, "stripped", "whole")])
def test_the_other_kind_is_refused_with_the_way_out(scalp: bool, shown: str, other: str, tmp_path: Path) -> None:
    path = write_volume(tmp_path / "head.nii.gz", *brain(scalp))
    for read in (read_scan, read_volume):
        read(path, HEADS, released=True)  # type: ignore[operator]
        read(path, with_head(shown), released=True)  # type: ignore[operator]
        read(path, with_head(other).with_any_head(), released=True)  # type: ignore[operator]
        with pytest.raises(ScanRejected, match="skull") as refused:
            read(path, with_head(other), released=True)  # type: ignore[operator]
        assert refused.value.rejection == Rejection.WRONG_GEOMETRY


def test_a_small_a_flat_or_an_unplaced_slice_is_not_judged() -> None:
    disc = np.hypot(*np.meshgrid(np.arange(60) - 30, np.arange(60) - 30)) < 15
    assert head_kind(Scan(disc.astype(np.float32), (2.0, 2.0), {})) is None
    assert head_kind(Scan(np.zeros((60, 60), np.float32), (2.0, 2.0), {})) is None
    assert head_kind(Scan(disc.astype(np.float32), None, {})) is None


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"image\.head"):
        from_mapping(Modality, {"prompt_template": "MRI", "image": {"head": "bald"}})


@pytest.mark.skipif(not COLIN27.is_dir(), reason="Debian's mricron-data is not installed")
@pytest.mark.parametrize(("name", "expected"), [("ch2", "whole"), ("ch2bet", "stripped")])
def test_a_real_head_and_its_brain(name: str, expected: str) -> None:
    assert kinds(nibabel.load(COLIN27 / f"{name}.nii.gz")) == {expected}


@pytest.mark.skipif(not OPEN_MS.is_dir(), reason="the shared heads are not here")
def test_defaced_heads_of_patients_are_whole() -> None:
    for path in sorted(OPEN_MS.glob("*/*_T1W.nii.gz")):
        assert kinds(nibabel.load(path)) == {"whole"}


def test_the_template_of_the_demo_is_stripped() -> None:
    datasets = pytest.importorskip("nilearn.datasets")
    assert kinds(datasets.load_mni152_template(resolution=2)) == {"stripped"}
