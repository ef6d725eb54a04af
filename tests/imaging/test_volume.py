"""All slices of a scan: the same ones whatever the file's orientation, and back into the file's own geometry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from ld_common.core.errors import ScanError
from ld_common.imaging.modality import ImageConfig, Modality
from ld_common.imaging.nifti import write_nifti_like
from ld_common.imaging.rejection import Rejection, ScanRejected
from ld_common.imaging.scan_reader import decode_scan
from ld_common.imaging.volume import check_same_grid, decode_volume
from tests.conftest import write_mr_slice
from tests.imaging.test_scan_reader import marked_volume

CODES = [("R", "A", "S"), ("L", "P", "S"), ("P", "S", "R"), ("A", "R", "I")]


def write_series(folder: Path, count: int = 5, **elements: Any) -> Path:
    """Axial slices 4 mm apart; each says by its values where it lies."""
    for number in range(count):
        pixels = np.arange(30, dtype=np.uint16).reshape(5, 6) + 100 * number
        place = {"ImagePositionPatient": [-10, -20, 4 * number], "PixelSpacing": [3.0, 2.0], "PatientAge": "066Y"}
        write_mr_slice(folder / f"{(number * 3) % 7}.dcm", pixels, **(place | elements))
    return folder


@pytest.mark.parametrize("codes", CODES)
def test_a_nifti_in_any_orientation_has_the_slices_that_a_scan_has(
    codes: tuple[str, str, str], brain_mri: Modality, tmp_path: Path
) -> None:
    path, canonical = marked_volume(codes, tmp_path)
    volume = decode_volume(path, brain_mri)
    assert np.shares_memory(volume.upright, volume.voxels)
    np.testing.assert_array_equal(volume.upright, canonical[::-1, ::-1].T)
    for index in range(4):
        own, one = volume.scan(index), decode_scan(path, brain_mri, index)
        np.testing.assert_array_equal(own.pixels, one.pixels)
        np.testing.assert_allclose(own.affine, one.affine, atol=1e-5)
        assert own.spacing_mm == pytest.approx(one.spacing_mm)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5, 4, 1)])
def test_a_nifti_is_written_in_the_very_geometry_of_its_source_and_without_its_words(
    kind: type, shape: tuple[int, ...], brain_mri: Modality, tmp_path: Path
) -> None:
    affine = np.array([[-0.0012, 0.0001, 0, 0.09], [0, 0, 0.003, -0.08], [0.0001, 0.002, 0, -0.07], [0, 0, 0, 1.0]])
    source = kind(np.arange(120, dtype=np.int16).reshape(shape), affine)
    source.set_sform(affine, 4)
    source.set_qform(affine, 1, strip_shears=True)
    source.header.set_xyzt_units("meter", "sec")
    source.header.set_slope_inter(2, -5)
    source.header["descrip"], source.header["aux_file"] = b"Planted Name", b"PLANTED"
    source.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Planted Name"))
    nibabel.save(source, tmp_path / "in.nii")
    volume = decode_volume(tmp_path / "in.nii", brain_mri)
    assert nibabel.affines.voxel_sizes(volume.affine) == pytest.approx([1.204, 2.002, 3.0], abs=1e-2)
    volume.upright[1] = 7.5
    write_nifti_like(tmp_path / "out.nii", volume.voxels, volume.affine, volume.header, "a slice")
    written, read = nibabel.load(tmp_path / "out.nii"), nibabel.load(tmp_path / "in.nii")
    assert type(written) is kind
    assert written.shape == read.shape == shape
    np.testing.assert_array_equal(written.affine, read.affine)
    for name in ("get_zooms", "get_qform", "get_sform", "get_xyzt_units"):
        np.testing.assert_array_equal(getattr(written.header, name)(), getattr(read.header, name)())
    for name in ("qform_code", "sform_code"):
        assert written.header[name] == read.header[name]
    assert np.count_nonzero(written.get_fdata() != read.get_fdata()) == 6 * 4
    assert b"lanted" not in (tmp_path / "out.nii").read_bytes().lower()
    with pytest.raises(ScanRejected, match="only real scans"):
        decode_volume(tmp_path / "out.nii", brain_mri)


def test_a_series_is_sorted_and_knows_where_it_lies(brain_mri: Modality, tmp_path: Path) -> None:
    volume = decode_volume(write_series(tmp_path / "series"), brain_mri)
    assert volume.voxels.shape == (6, 5, 5)
    assert volume.attributes_in_file == {"age": 66.0}
    assert volume.axial
    for index in range(5):
        own, one = volume.scan(index), decode_scan(tmp_path / "series", brain_mri, index)
        assert own.pixels[0, 0] == 100 * index
        np.testing.assert_array_equal(own.pixels, one.pixels)
        np.testing.assert_allclose(own.affine[:, [0, 1, 3]], one.affine[:, [0, 1, 3]])


def test_a_series_of_sagittal_slices_has_axial_ones_all_the_same(brain_mri: Modality, tmp_path: Path) -> None:
    path, canonical = marked_volume(("R", "A", "S"), tmp_path)
    affine = nibabel.load(path).affine
    for number in range(6):  # from the right, rows to the feet, columns to the back
        x, y, z = affine[:3, 3] + affine[:3, :3] @ (5 - number, 4, 3)
        pixels = np.ascontiguousarray(canonical[5 - number, ::-1, ::-1].T).astype(np.uint16)
        place = {"ImagePositionPatient": [-x, -y, z], "ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
        write_mr_slice(tmp_path / "series" / f"{number}.dcm", pixels, PixelSpacing=[4.0, 3.0], **place)
    volume = decode_volume(tmp_path / "series", brain_mri)
    assert not volume.axial
    np.testing.assert_allclose(volume.upright, canonical[::-1, ::-1].T.astype(np.uint16))
    np.testing.assert_allclose(volume.scan(2).affine, decode_volume(path, brain_mri).scan(2).affine)


@pytest.mark.parametrize(
    ("elements", "words"),
    [
        ({"ImagePositionPatient": [-10, -20, 30]}, "4 to 14 mm apart"),
        ({"ImagePositionPatient": [-10, -20, 4]}, "at one position"),
        ({"ImagePositionPatient": None}, "cannot be sorted"),
        ({"ImagePositionPatient": [-10, -20, 20], "PixelSpacing": [3.0, 3.0]}, "another orientation or spacing"),
        ({"ImagePositionPatient": [-10, -20, 20], "SeriesInstanceUID": "1.2.3"}, "2 series"),
        ({"ImagePositionPatient": [-10, -20, 20], "Modality": "CT"}, "Modality is not MR"),
    ],
)
def test_a_series_that_is_no_volume_is_refused(
    elements: dict[str, Any], words: str, brain_mri: Modality, tmp_path: Path
) -> None:
    write_series(tmp_path)
    changed = {"PixelSpacing": [3.0, 2.0], **elements}
    write_mr_slice(tmp_path / "more.dcm", np.ones((5, 6), np.uint16), **changed)
    with pytest.raises(ScanRejected, match=words):
        decode_volume(tmp_path, brain_mri)


def test_a_tilted_series_slices_of_two_sizes_and_one_slice_are_refused(brain_mri: Modality, tmp_path: Path) -> None:
    for number in range(3):
        place = {"ImagePositionPatient": [0, 2 * number, 4 * number]}
        write_mr_slice(tmp_path / "tilted" / f"{number}.dcm", np.ones((5, 6), np.uint16), **place)
        shape, place = (5 + number, 6), {"ImagePositionPatient": [0, 0, 4 * number]}
        write_mr_slice(tmp_path / "sizes" / f"{number}.dcm", np.ones(shape, np.uint16), **place)
    write_mr_slice(tmp_path / "one" / "1.dcm", np.ones((5, 6), np.uint16))
    for name, words in (("tilted", "tilted"), ("sizes", "several sizes"), ("one", "one slice")):
        with pytest.raises(ScanRejected, match=words):
            decode_volume(tmp_path / name, brain_mri)


def test_what_has_one_slice_or_a_release_of_radiographs_has_no_volume(brain_mri: Modality, tmp_path: Path) -> None:
    path, _ = marked_volume(("R", "A", "S"), tmp_path)
    with pytest.raises(ScanRejected, match="draws no volume"):
        decode_volume(path, Modality(prompt_template="a radiograph", image=ImageConfig(plane="none")))
    with pytest.raises(ScanRejected, match="give a NIfTI file"):
        decode_volume(write_mr_slice(tmp_path / "a.dcm", np.ones((5, 6), np.uint16)), brain_mri)


def test_voxels_that_are_no_numbers_become_the_lowest(brain_mri: Modality, tmp_path: Path) -> None:
    data = np.arange(24, dtype=np.float32).reshape(2, 3, 4) + 5
    data[1, 1] = np.nan
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii")
    assert (decode_volume(tmp_path / "a.nii", brain_mri).voxels[1, 1] == 5).all()
    nibabel.save(nibabel.Nifti1Image(data * np.nan, np.eye(4)), tmp_path / "b.nii")
    with pytest.raises(ScanRejected) as caught:
        decode_volume(tmp_path / "b.nii", brain_mri)
    assert caught.value.rejection == Rejection.UNREADABLE


def test_another_grid_is_named(brain_mri: Modality, tmp_path: Path) -> None:
    volume = decode_volume(marked_volume(("R", "A", "S"), tmp_path)[0], brain_mri)
    turned = decode_volume(marked_volume(("L", "A", "S"), tmp_path)[0], brain_mri)
    check_same_grid(Path("mask.nii"), volume, volume)
    with pytest.raises(ScanError, match=r"'mask.nii' has another grid, 6 x 5 x 4 voxels"):
        check_same_grid(Path("mask.nii"), turned, volume)
