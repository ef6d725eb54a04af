from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ld_common.core.errors import ScanError
from ld_common.imaging.geometry import Frame, Scan, from_model, to_model
from ld_common.imaging.image_io import write_difference_png, write_png
from ld_common.imaging.modality import ImageConfig, Modality
from ld_common.imaging.nifti import write_nifti
from ld_common.imaging.rejection import Rejection, ScanRejected
from ld_common.imaging.scan_reader import decode_scan

FULL = ImageConfig(field_of_view_mm=0, low_percentile=0, high_percentile=100)


def blob(height: int, width: int, row: float, column: float, radius: float) -> np.ndarray:
    """A Gaussian spot whose middle is at (row, column), in pixels from the image's own middle."""
    rows = np.arange(height)[:, None] + 0.5 - height / 2 - row
    columns = np.arange(width)[None, :] + 0.5 - width / 2 - column
    return np.exp(-(rows**2 + columns**2) / (2 * radius**2)).astype(np.float32)


def centre(pixels: np.ndarray) -> tuple[float, float]:
    """Centre of mass in pixels from the image's middle."""
    mass = pixels - pixels.min()
    rows, columns = (np.arange(size) + 0.5 - size / 2 for size in mass.shape)
    return float(mass.sum(1) @ rows / mass.sum()), float(mass.sum(0) @ columns / mass.sum())


def test_the_same_grid_comes_back_exactly() -> None:
    pixels = np.random.default_rng(0).normal(500, 200, (32, 32)).astype(np.float32)
    picture, frame = to_model(Scan(pixels, (2.0, 2.0), {}), 32, FULL)
    assert picture.dtype == torch.float32
    assert (float(picture.min()), float(picture.max())) == (-1.0, 1.0)
    np.testing.assert_allclose(from_model(picture, frame), pixels, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("size", "side"), [(96, 32), (100, 32), (50, 64), (37, 32)])
def test_a_whole_square_is_resampled_as_torch_does_with_antialiasing(size: int, side: int) -> None:
    pixels = np.random.default_rng(1).random((size, size)).astype(np.float32)
    picture, _ = to_model(Scan(pixels, (1.0, 1.0), {}), side, FULL)
    low, high = pixels.min(), pixels.max()
    scaled = torch.from_numpy((pixels - low) / (high - low) * 2 - 1)[None, None]
    expected = F.interpolate(scaled, (side, side), mode="bilinear", antialias=True, align_corners=False)[0]
    torch.testing.assert_close(picture, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", [(120, 90), (64, 64), (41, 33), (40, 60)])
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.9375, 1.3), (3.1, 2.7)])
def test_nothing_moves_there_or_back(shape: tuple[int, int], spacing: tuple[float, float]) -> None:
    config = ImageConfig(field_of_view_mm=80, low_percentile=0, high_percentile=100)
    row_mm, column_mm = 5.3, -7.7
    pixels = blob(*shape, row_mm / spacing[0], column_mm / spacing[1], max(2.0 / spacing[0], 1.2))
    picture, frame = to_model(Scan(pixels, spacing, {}), 64, config)
    millimetres = np.array(centre(picture[0].numpy())) * 80 / 64
    np.testing.assert_allclose(millimetres, [row_mm, column_mm], atol=0.05)
    back = from_model(picture, frame)
    assert back.shape == shape
    np.testing.assert_allclose(np.array(centre(back)) * spacing, [row_mm, column_mm], atol=0.05)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.9, 1.4)])
def test_a_smooth_image_comes_back(spacing: tuple[float, float]) -> None:
    pixels = blob(120, 90, 3.2, -4.1, 9)
    picture, frame = to_model(Scan(pixels, spacing, {}), 64, FULL)
    np.testing.assert_allclose(from_model(picture, frame), pixels, atol=0.03)


def test_outside_the_image_is_lowest_and_outside_the_field_of_view_stays_lowest() -> None:
    pixels = np.full((40, 20), 7.0, np.float32)
    pixels[0, 0] = 3.0
    narrow = Scan(pixels, (1.0, 1.0), {})
    picture, _ = to_model(narrow, 40, FULL)
    assert (picture[0, :, :10] == -1).all()
    assert (picture[0, 1:, 12:28] == 1).all()
    small = ImageConfig(field_of_view_mm=10, low_percentile=0, high_percentile=100)
    back = from_model(torch.ones(1, 16, 16), to_model(narrow, 16, small)[1])
    assert (back[15:25, 5:15] == 7).all()
    assert back[0, 0] == back[14, 4] == back[39, 10] == 3


def test_values_beyond_the_percentiles_are_clipped_before_they_spread() -> None:
    pixels = np.tile(np.linspace(0, 100, 64, dtype=np.float32), (64, 1))
    clean, _ = to_model(Scan(pixels, (1.0, 1.0), {}), 32, ImageConfig(field_of_view_mm=0, high_percentile=99))
    pixels[10, 63] = 1e9
    spoilt, frame = to_model(Scan(pixels, (1.0, 1.0), {}), 32, ImageConfig(field_of_view_mm=0, high_percentile=99))
    assert frame.high <= 100
    torch.testing.assert_close(clean, spoilt, atol=0.02, rtol=0)


def test_another_scans_window_can_be_taken() -> None:
    first = Scan(np.maximum(blob(32, 32, 0, 0, 5) - 0.1, 0) * 100, (1.0, 1.0), {})
    second = dataclasses.replace(first, pixels=first.pixels * 0.5)
    picture, frame = to_model(first, 32, FULL)
    dimmer, _ = to_model(second, 32, FULL, frame)
    torch.testing.assert_close((dimmer + 1) * 2, picture + 1, atol=1e-4, rtol=0)


def test_an_image_of_one_value_is_refused() -> None:
    with pytest.raises(ScanError, match="no contrast"):
        to_model(Scan(np.ones((8, 8), np.float32), (1.0, 1.0), {}), 8, FULL)


def marked_volume(codes: tuple[str, str, str], tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A NIfTI in the given orientation whose voxels know where they are, and its canonical data."""
    data = np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4)
    affine = np.array([[2, 0, 0, -9], [0, 3, 0, -8], [0, 0, 4, -7], [0, 0, 0, 1.0]])
    image = nibabel.Nifti1Image(data, affine)
    image.header.set_slope_inter(0.5, 10)
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(codes))
    path = tmp_path / f"{''.join(codes)}.nii.gz"
    nibabel.save(image.as_reoriented(turn), path)
    return path, np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj)


@pytest.mark.parametrize("codes", [("R", "A", "S"), ("L", "P", "S"), ("P", "S", "R"), ("A", "R", "I")])
@pytest.mark.parametrize("index", [None, 0, 3])
def test_any_nifti_orientation_gives_the_same_slice(
    codes: tuple[str, str, str], index: int | None, brain_mri: Modality, tmp_path: Path
) -> None:
    path, canonical = marked_volume(codes, tmp_path)
    scan = decode_scan(path, brain_mri, index)
    chosen = 2 if index is None else index
    # first row is the patient's front, first column the right side
    np.testing.assert_array_equal(scan.pixels, canonical[::-1, ::-1, chosen].T)
    assert scan.spacing_mm == pytest.approx((3.0, 2.0))
    frame = to_model(scan, 16, brain_mri.image)[1]
    write_nifti(tmp_path / "out.nii.gz", scan.pixels, frame)
    written, source = nibabel.load(tmp_path / "out.nii.gz"), nibabel.as_closest_canonical(nibabel.load(path))
    np.testing.assert_allclose(written.affine, source.slicer[:, :, chosen : chosen + 1].affine, atol=1e-5)
    np.testing.assert_array_equal(written.get_fdata()[..., 0], canonical[..., chosen])
    assert bytes(written.header["descrip"].item()) == b"synthetic"


def test_dicom_and_nifti_of_one_slice_look_the_same(
    brain_mri: Modality, tmp_path: Path, write_dicom: Callable[..., Path]
) -> None:
    pixels = np.arange(30, dtype=np.uint16).reshape(5, 6)
    upright = decode_scan(write_dicom(tmp_path / "a.dcm", pixels, PixelSpacing=[3.0, 2.0]), brain_mri)
    turned = write_dicom(
        tmp_path / "b.dcm",
        np.ascontiguousarray(pixels[::-1, ::-1]),
        ImageOrientationPatient=[-1, 0, 0, 0, -1, 0],
        ImagePositionPatient=[10, 12, 0],
        PixelSpacing=[3.0, 2.0],
    )
    np.testing.assert_array_equal(upright.pixels, pixels)
    np.testing.assert_array_equal(decode_scan(turned, brain_mri).pixels, pixels)
    np.testing.assert_allclose(decode_scan(turned, brain_mri).affine, upright.affine)
    write_nifti(tmp_path / "a.nii", upright.pixels, upright)
    volume = nibabel.load(tmp_path / "a.nii")
    volume.header["descrip"] = b""
    nibabel.save(nibabel.Nifti1Image(volume.get_fdata(), volume.affine), tmp_path / "c.nii")
    again = decode_scan(tmp_path / "c.nii", brain_mri)
    np.testing.assert_array_equal(again.pixels, upright.pixels)
    np.testing.assert_allclose(again.affine, upright.affine)
    assert again.spacing_mm == upright.spacing_mm


def test_voxels_that_are_no_numbers_become_the_lowest(brain_mri: Modality, tmp_path: Path) -> None:
    data = np.arange(12, dtype=np.float32).reshape(3, 4, 1)
    data[0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii")
    assert decode_scan(tmp_path / "a.nii", brain_mri).pixels[-1, -1] == 1


@pytest.mark.parametrize(("unit", "scale"), [("mm", 1.0), ("unknown", 1.0), ("meter", 0.001), ("micron", 1000.0)])
def test_a_nifti_in_another_unit_is_the_same_scan(unit: str, scale: float, brain_mri: Modality, tmp_path: Path) -> None:
    data = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    volume = nibabel.Nifti1Image(data, np.diag([2.0 * scale, 3.0 * scale, 4.0 * scale, 1]))
    volume.header.set_xyzt_units(unit)
    nibabel.save(volume, tmp_path / "a.nii")
    scan = decode_scan(tmp_path / "a.nii", brain_mri)
    assert scan.spacing_mm == pytest.approx((3.0, 2.0))
    np.testing.assert_allclose(scan.affine[:3, 3], [4, 9, 8], rtol=1e-5)  # type: ignore[index]


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -2, 1), (1, 1, np.nan)])
def test_voxel_sizes_that_are_none_are_refused_in_one_line(
    sizes: tuple[float, ...], brain_mri: Modality, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = bytearray(nibabel.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4)).to_bytes())
    content[80:92] = np.array(sizes, np.float32).tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(ScanRejected, match="its voxel sizes are"):
        decode_scan(tmp_path / "a.nii", brain_mri)
    assert capfd.readouterr().err == ""  # nibabel would say how it mends them


def test_niftis_that_cannot_be_used_are_refused(brain_mri: Modality, tmp_path: Path) -> None:
    series = nibabel.Nifti1Image(np.zeros((3, 3, 3, 2), np.int16), np.eye(4))
    complex_values = nibabel.Nifti1Image(np.zeros((3, 3, 3), np.complex64), np.eye(4))
    flat = bytearray(nibabel.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4)).to_bytes())
    flat[312:328] = bytes(16)  # the affine's third row
    huge = bytearray(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)).to_bytes())
    huge[40:48] = np.array([3, 30000, 30000, 30000], np.int16).tobytes()
    for name, content, refusal in (
        ("time", series.to_bytes(), Rejection.UNSUPPORTED),
        ("complex", complex_values.to_bytes(), Rejection.UNSUPPORTED),
        ("flat", bytes(flat), Rejection.WRONG_GEOMETRY),
        ("huge", bytes(huge), Rejection.TOO_LARGE),
        ("text", b"not a volume", Rejection.UNREADABLE),
        ("short", series.to_bytes()[:300], Rejection.UNREADABLE),
    ):
        path = tmp_path / f"{name}.nii"
        path.write_bytes(content)
        with pytest.raises(ScanRejected) as caught:
            decode_scan(path, brain_mri)
        assert caught.value.rejection == refusal, name


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_png_is_read_with_its_whole_longer_side(dtype: type, brain_mri: Modality, tmp_path: Path) -> None:
    pixels = (np.arange(48).reshape(6, 8) * (5 if dtype is np.uint8 else 1300)).astype(dtype)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    scan = decode_scan(tmp_path / "a.png", brain_mri)
    np.testing.assert_array_equal(scan.pixels, pixels.astype(np.float32))
    assert scan.spacing_mm is None
    assert to_model(scan, 8, brain_mri.image)[1].field_of_view == 8


def test_pngs_that_cannot_be_used_are_refused(brain_mri: Modality, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (200, 100, 100)).save(tmp_path / "colour.png")
    write_png(tmp_path / "ours.png", np.eye(4), frame_of(np.eye(4)), {"SyntheticData": "YES"})
    (tmp_path / "cut.png").write_bytes((tmp_path / "colour.png").read_bytes()[:40])
    for name, refusal in (
        ("colour.png", Rejection.UNSUPPORTED),
        ("ours.png", Rejection.SYNTHETIC),
        ("cut.png", Rejection.UNREADABLE),
        ("absent.png", Rejection.UNREADABLE),
    ):
        with pytest.raises(ScanRejected) as caught:
            decode_scan(tmp_path / name, brain_mri)
        assert caught.value.rejection == refusal, name


def frame_of(pixels: np.ndarray) -> Frame:
    return to_model(Scan(pixels.astype(np.float32), None, {}), 8, FULL)[1]


def test_a_written_png_keeps_its_text_and_values(tmp_path: Path) -> None:
    values = np.array([[0.0, 50.0], [100.0, 300.0]])
    frame = dataclasses.replace(frame_of(values), high=100.0)
    write_png(tmp_path / "a.png", values, frame, {"SyntheticData": "YES", "Prompt": "Größe"})
    with Image.open(tmp_path / "a.png") as image:
        assert (image.mode, image.text["SyntheticData"], image.text["Prompt"]) == ("L", "YES", "Größe")
        assert np.asarray(image).tolist() == [[0, 128], [255, 255]]


def test_a_difference_map_is_white_at_zero_and_symmetrical(tmp_path: Path) -> None:
    write_difference_png(tmp_path / "d.png", torch.tensor([[[-0.5, 0.0, 0.5, 0.25]]]))
    with Image.open(tmp_path / "d.png") as image:
        assert image.text["DifferenceLimit"] == "0.5"
        (below, zero, above, half) = np.asarray(image)[0].astype(int)
    assert zero.min() > 240
    assert below[2] > below[0]
    assert above[0] > above[2]
    assert above.sum() < half.sum() < zero.sum()


def test_a_file_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match="cannot write"):
        write_png(tmp_path / "absent" / "a.png", np.eye(3), frame_of(np.eye(3)), {})


def test_a_folder_is_one_series_sorted_along_its_normal(
    brain_mri: Modality, tmp_path: Path, write_dicom: Callable[..., Path]
) -> None:
    for number, height in enumerate([8, 0, 4, -4, -8]):  # InstanceNumber says another order
        pixels = np.full((4, 4), 100 + height, np.uint16)
        place = [0, 0, height]
        write_dicom(tmp_path / f"{number}.dcm", pixels, InstanceNumber=number, ImagePositionPatient=place)
    (tmp_path / "notes.txt").write_text("not a DICOM file")
    assert decode_scan(tmp_path, brain_mri).pixels[0, 0] == 100
    assert [decode_scan(tmp_path, brain_mri, index).pixels[0, 0] for index in range(5)] == [92, 96, 100, 104, 108]
    with pytest.raises(ScanRejected, match="slice 5 of 5"):
        decode_scan(tmp_path, brain_mri, 5)
    write_dicom(tmp_path / "other.dcm", np.zeros((4, 4), np.uint16), SeriesInstanceUID="1.2.3")
    with pytest.raises(ScanRejected, match="2 series"):
        decode_scan(tmp_path, brain_mri)
