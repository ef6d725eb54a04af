"""Text in pixels is found however it is drawn and whichever way it enters; side markers are not text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from ld_common.imaging.burned_in_text import check_burned_in_text, find_text
from ld_common.imaging.modality import ImageConfig, Modality
from ld_common.imaging.readers import read_scan, read_volume
from ld_common.imaging.rejection import Rejection, ScanRejected
from ld_common.imaging.scan_table import read_scan_table

pytestmark = pytest.mark.usefixtures("search_for_text")
Draw = Callable[[np.ndarray, np.ndarray], np.ndarray]
WriteDicom = Callable[..., Path]
NAME, SHAPE = "WEBER, ANNA", (72, 128)


def anatomy(shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """A noisy bright ellipse on a dark ground, values 0 to 1."""
    rows, columns = (np.linspace(-1, 1, length) for length in shape)
    inside = rows[:, None] ** 2 + columns[None, :] ** 2 < 0.6
    noise = np.random.default_rng(0).normal(0, 0.01, shape)
    return np.clip(0.05 + 0.5 * inside + noise, 0, 1)


def ink(text: str, size_px: int = 14, at: tuple[int, int] = (20, 3), shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """Share of each pixel that the text covers; `at` is a (column, row)."""
    layer = Image.new("L", shape[::-1])
    ImageDraw.Draw(layer).text(at, text, font=ImageFont.load_default(size_px), fill=255)
    return np.asarray(layer, np.float64) / 255


def with_text(text: str = NAME) -> np.ndarray:
    return np.maximum(anatomy(), ink(text))


DRAWN: dict[str, Draw] = {
    "bright": np.maximum,
    "dark on a bright box": lambda image, text: np.where(np.arange(len(image))[:, None] < 24, 0.9, image) * (1 - text),
    "half transparent": lambda image, text: image * (1 - text / 2) + text / 2,
    "a sixth of the range": lambda image, text: image + text / 6,
    "mirrored": lambda image, text: np.maximum(image, text[:, ::-1]),
    "upside down": lambda image, text: np.maximum(image, text)[::-1, ::-1],
    "upright": lambda image, text: np.rot90(np.maximum(image, text)),
    "transposed": lambda image, text: np.maximum(image, text).T,
}


@pytest.mark.slow
@pytest.mark.attack
@pytest.mark.parametrize("way", DRAWN)
def test_a_name_is_found_however_it_is_drawn(way: str) -> None:
    image = DRAWN[way](anatomy(), ink(NAME))
    assert find_text(image.astype(np.float32))


@pytest.mark.slow
@pytest.mark.attack
@pytest.mark.parametrize("text", ["12.03.1957", "47118823", "A. Nowak"])
def test_dates_numbers_and_small_letters_are_found(text: str) -> None:
    assert find_text(with_text(text).astype(np.float32))


@pytest.mark.attack
def test_one_pixel_far_beyond_the_others_does_not_hide_a_name() -> None:
    image = (1000 * with_text()).astype(np.float32)
    image[60, 5] = 4e6
    assert find_text(image)


@pytest.mark.attack
def test_text_over_anatomy_in_sixteen_bits_is_found() -> None:
    image = np.maximum(anatomy(), ink(NAME, at=(20, 30)))
    assert find_text(np.round(image * 65535).astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "L", "R", "PORTABLE", "AP"])
def test_anatomy_and_side_markers_are_not_text(text: str) -> None:
    assert find_text(with_text(text).astype(np.float32)) == []


@pytest.mark.parametrize("shape", [(4, 4), (64, 64), (1, 500)])
def test_an_image_without_contrast_or_room_holds_no_text(shape: tuple[int, int]) -> None:
    assert find_text(np.full(shape, 7.0, np.float32)) == []


def test_a_refusal_says_where_and_what_to_do_but_not_what_it_read() -> None:
    with pytest.raises(ScanRejected) as caught:
        check_burned_in_text(Path("a.png"), with_text().astype(np.float32))
    assert caught.value.rejection == Rejection.BURNED_IN
    assert "top" in caught.value.detail
    assert "data.burned_in_text_checked" in caught.value.detail
    assert "WEBER" not in str(caught.value)


@pytest.mark.attack
@pytest.mark.parametrize("annotation", ["NO", None])
def test_a_header_that_denies_text_is_not_believed(
    annotation: str | None, tmp_path: Path, write_dicom: WriteDicom, brain_mri: Modality
) -> None:
    pixels = np.round(1000 * with_text()).astype(np.uint16)
    elements = {} if annotation is None else {"BurnedInAnnotation": annotation}
    refuses_until_checked(write_dicom(tmp_path / "a.dcm", pixels, **GEOMETRY, **elements), brain_mri)


@pytest.mark.attack
def test_text_in_a_png_is_refused(tmp_path: Path, brain_mri: Modality) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.round(255 * with_text()).astype(np.uint8)).save(path)
    refuses_until_checked(path, dataclasses.replace(brain_mri, image=ImageConfig(plane="none")))


@pytest.mark.attack
@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_text_in_a_slice_of_a_nifti_is_refused(flip: float, tmp_path: Path, brain_mri: Modality) -> None:
    path = tmp_path / "a.nii.gz"
    voxels = np.stack([anatomy(), with_text(), anatomy()], -1).transpose(1, 0, 2).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([flip, 1.0, 3.0, 1.0])), path)
    refuses_until_checked(path, brain_mri)
    with pytest.raises(ScanRejected):
        read_volume(path, brain_mri)
    assert read_volume(path, brain_mri, released=True).voxels.shape == voxels.shape


@pytest.mark.attack
def test_a_table_of_scans_holds_text_back_until_its_column_says_checked(tmp_path: Path, brain_mri: Modality) -> None:
    modality = dataclasses.replace(brain_mri, image=ImageConfig(plane="none"))
    Image.fromarray(np.round(255 * with_text()).astype(np.uint8)).save(tmp_path / "a.png")
    table = tmp_path / "scans.csv"
    table.write_text("patient,input,age,sex,diagnosis\n1,a.png,70,F,CN\n")
    with pytest.raises(ScanRejected, match="a column burned_in_text_checked"):
        read_scan_table(table, modality, 32)
    table.write_text("patient,input,age,sex,diagnosis,burned_in_text_checked\n1,a.png,70,F,CN,yes\n")
    assert read_scan_table(table, modality, 32).images.shape == (1, 1, 32, 32)


def refuses_until_checked(path: Path, modality: Modality) -> None:
    with pytest.raises(ScanRejected) as caught:
        read_scan(path, modality)
    assert caught.value.rejection == Rejection.BURNED_IN
    assert read_scan(path, modality, released=True).pixels.shape == SHAPE


GEOMETRY = {
    "PixelSpacing": [1.0, 1.0],
    "ImageOrientationPatient": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
    "ImagePositionPatient": [0.0, 0.0, 0.0],
}
