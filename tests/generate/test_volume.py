"""`ld-generate volume`: which slices are edited, what the others keep, and the geometry of what is written."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from ld_common.core.errors import RequestError
from ld_generate.volume import choose_slices, slices_around
from tests.conftest import write_mr_slice
from tests.support.releases import SOURCE, GenerateRunner

COUNT = 9


def head(number: int) -> np.ndarray:
    """One slice's pixels `(70,60)`, rows to the back, columns to the left."""
    pixels = np.zeros((70, 60), np.uint16)
    pixels[10:60, 10:50] = np.random.default_rng(number).integers(300, 900, (50, 40))
    return pixels


@pytest.fixture
def nifti(tmp_path: Path) -> Path:
    """A volume whose file counts its slices downwards."""
    slices = np.stack([head(number)[::-1, ::-1].T for number in reversed(range(COUNT))], -1).astype(np.int16)
    volume = nibabel.Nifti1Image(slices, [[3, 0, 0, -90], [0, 3, 0, -100], [0, 0, -4, 50], [0, 0, 0, 1]])
    nibabel.save(volume, tmp_path / "head.nii.gz")
    return tmp_path / "head.nii.gz"


@pytest.fixture
def series(tmp_path: Path) -> Path:
    for number in range(COUNT):
        place = {"ImagePositionPatient": [-90, -100.5, 4 * number], "PixelSpacing": [3.0, 3.0]}
        write_mr_slice(tmp_path / "series" / f"{number}.dcm", head(number), PatientID="SECRET-1", **place)
    return tmp_path / "series"


def values_of(path: Path) -> np.ndarray:
    image = pydicom.dcmread(path)
    return image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept)


@pytest.mark.slow
def test_a_nifti_comes_back_in_its_geometry_with_the_chosen_slices_edited(
    run: GenerateRunner,
    nifti: Path,
    tmp_path: Path,
) -> None:
    options = [
        "--target",
        "age=84",
        "--target",
        "sex=M",
        "--source",
        SOURCE,
        "--guidance-scale",
        4,
        "--out",
        tmp_path / "out",
        "--rendering",
        "difference",
    ]
    code, printed = run("volume", "--slices", "3:5", "--input", nifti, *options)
    assert code == 0, printed
    folder = tmp_path / "out" / "head"
    assert {file.name for file in folder.iterdir()} == {
        "age-84.nii.gz",
        "sex-M.nii.gz",
        "montage.png",
        "planes.png",
        "record.json",
    }
    scan, drawn = nibabel.load(nifti), nibabel.load(folder / "age-84.nii.gz")
    np.testing.assert_array_equal(drawn.affine, scan.affine)
    assert drawn.shape == scan.shape
    changed = (drawn.get_fdata() != scan.get_fdata()).any((0, 1))
    assert np.flatnonzero(changed).tolist() == [3, 4, 5]  # of 9, downwards as upwards
    assert bytes(drawn.header["descrip"].item()) == b"synthetic slices 3 to 5 of 0 to 8; the others are the input's"
    record = json.loads((folder / "record.json").read_text())
    assert record["edited_slices"] == {"first": 3, "last": 5, "of": COUNT}
    assert record["warnings"][-1].startswith("slices 3 to 5: the release was trained on slices like 4 to 4")
    assert record["counterfactuals"][1]["files"] == ["sex-M.nii.gz"]


@pytest.mark.slow
def test_a_deformation_falls_off_beyond_the_edited_slices_and_keeps_what_is_preserved(
    run: GenerateRunner, nifti: Path, tmp_path: Path
) -> None:
    scan = nibabel.load(nifti)
    kept = np.zeros(scan.shape, np.uint8)
    kept[:30] = 1
    nibabel.save(nibabel.Nifti1Image(kept, scan.affine), tmp_path / "kept.nii.gz")
    options = ["--input", nifti, "--target", "age=84", "--source", SOURCE, "--guidance-scale", 4, "--slices", "4:4"]
    code, printed = run("volume", *options, "--preserve-mask", tmp_path / "kept.nii.gz", "--out", tmp_path / "out")
    assert code == 0, printed
    record = json.loads((tmp_path / "out/head/record.json").read_text())
    assert (record["rendering"], record["edited_slices"]["first"]) == ("deformation", 4)
    assert record["changed_slices"] == {"first": 2, "last": 6}
    drawn = nibabel.load(tmp_path / "out/head/age-84.nii.gz").get_fdata()
    apart = np.abs(drawn - scan.get_fdata())
    assert np.flatnonzero(apart.any((0, 1))).tolist() == [2, 3, 4, 5, 6]
    assert apart[:30].max() == 0
    assert apart[35:, :, 4].mean() > apart[35:, :, 2].mean() > 0
    assert set(np.unique(drawn)) != set(np.unique(scan.get_fdata()))
    assert scan.get_fdata().min() <= drawn.min() <= drawn.max() <= scan.get_fdata().max()


@pytest.mark.slow
def test_a_series_comes_back_as_a_synthetic_series_in_its_place(
    run: GenerateRunner,
    series: Path,
    tmp_path: Path,
) -> None:
    options = [
        "--target",
        "age=84",
        "--source",
        SOURCE,
        "--guidance-scale",
        4,
        "--watermark",
        "--rendering",
        "difference",
        "--out",
        tmp_path / "out",
    ]
    code, printed = run("volume", "--input", series, *options)
    assert code == 0, printed
    folder = tmp_path / "out" / "series"
    written = [pydicom.dcmread(folder / "age-84" / f"IM{number:04d}.dcm") for number in range(1, COUNT + 1)]
    for number, image in enumerate(written):
        source = pydicom.dcmread(series / f"{number}.dcm")
        for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
            assert list(image[name].value) == pytest.approx(list(source[name].value))
        assert (image.SpacingBetweenSlices, image.InstanceNumber) == (4, number + 1)
        edited = number == COUNT // 2
        assert image.BurnedInAnnotation == ("YES" if edited else "NO")
        assert ("an edited slice" if edited else "the input's own values") in image.DerivationDescription
        apart = np.abs(values_of(Path(image.filename)) - head(number)).max()
        assert apart > 50 if edited else apart <= float(image.RescaleSlope)
        assert "SECRET" not in str(image).upper()
        assert "Family" not in str(image)
    for name, kinds in (("SOPInstanceUID", COUNT), ("SeriesInstanceUID", 1), ("FrameOfReferenceUID", 1)):
        assert len({image[name].value for image in written}) == kinds
        assert written[0][name].value != pydicom.dcmread(series / "0.dcm").get(name)
    assert (
        len({(image.RescaleSlope, image.WindowCenter) for image in written}) == 1
    )  # one scale, so that no slice flickers
    volume = nibabel.load(folder / "age-84.nii.gz")
    middle = volume.get_fdata()[..., COUNT // 2].T
    np.testing.assert_allclose(middle, values_of(folder / "age-84" / "IM0005.dcm"), atol=0.1)
    np.testing.assert_allclose(volume.affine @ (0, 0, 4, 1), [90, 100.5, 16, 1])
    assert json.loads((folder / "record.json").read_text())["watermark"] is True


@pytest.mark.slow
def test_slices_that_are_alike_get_the_same_noise_whatever_the_batch(
    run: GenerateRunner,
    tmp_path: Path,
) -> None:
    same = np.repeat(head(0).T[..., None], 5, -1).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(same, np.diag([3.0, 3, 4, 1])), tmp_path / "same.nii")
    options = ["--target", "age=90", "--source", SOURCE, "--guidance-scale", 4, "--slices", "0:4", "--editor", "sdedit"]
    out = ["--out", tmp_path / "out", "batch_size=2"]
    code, printed = run("volume", "--input", tmp_path / "same.nii", *options, *out)
    assert code == 0, printed
    drawn = nibabel.load(tmp_path / "out" / "same" / "age-90.nii.gz").get_fdata()
    changed = np.abs(drawn - same).max()
    assert changed > 2
    assert np.abs(drawn - drawn[..., :1]).max() < changed / 50


@pytest.mark.slow
def test_where_nothing_changes_the_scan_comes_back(
    run: GenerateRunner,
    nifti: Path,
    tmp_path: Path,
) -> None:
    options = [
        "--target",
        "age=84",
        "--source",
        SOURCE,
        "--guidance-scale",
        0,
        "--slices",
        "0:8",
        "--out",
        tmp_path / "out",
    ]
    assert run("volume", "--input", nifti, *options)[0] == 0
    drawn = nibabel.load(tmp_path / "out" / "head" / "age-84.nii.gz").get_fdata()
    np.testing.assert_allclose(drawn, nibabel.load(nifti).get_fdata(), atol=0.5)


@pytest.mark.slow
def test_a_mask_of_the_same_voxels_keeps_a_region(
    run: GenerateRunner,
    nifti: Path,
    tmp_path: Path,
) -> None:
    scan = nibabel.load(nifti)
    kept = np.zeros(scan.shape, np.uint8)
    kept[:, :40, 4] = 1
    nibabel.save(nibabel.Nifti1Image(kept, scan.affine), tmp_path / "kept.nii.gz")
    options = [
        "--target",
        "age=84",
        "--source",
        SOURCE,
        "--guidance-scale",
        4,
        "--preserve-mask",
        tmp_path / "kept.nii.gz",
        "--rendering",
        "difference",
    ]
    common = ["--input", nifti, *options, "--out", tmp_path / "out"]
    code, printed = run("volume", *common, "--slices", "3:4", "num_inference_steps=4")
    assert code == 0, printed
    apart = np.abs(nibabel.load(tmp_path / "out" / "head" / "age-84.nii.gz").get_fdata() - scan.get_fdata())
    assert apart[:, :40, 4].max() == 0
    assert apart[:, 50:, 4].max() > 20 < apart[:, :40, 5].max()
    code, printed = run("volume", *common, "--slices", "0:2")
    assert (code, "is 0 in all edited slices" in " ".join(printed.split())) == (2, True)
    nibabel.save(nibabel.Nifti1Image(kept, np.eye(4)), tmp_path / "kept.nii.gz")
    code, printed = run("volume", *common)
    assert (code, "has another grid" in printed) == (2, True)


def test_a_scan_of_one_slice_is_no_volume(
    run: GenerateRunner,
    tmp_path: Path,
) -> None:
    Image.fromarray(head(0).astype(np.uint8)).save(tmp_path / "a.png")
    options = ["--input", tmp_path / "a.png", "--target", "age=80", "--source", SOURCE]
    code, printed = run("volume", *options, "--out", tmp_path / "out")
    assert (code, "not a volume" in printed) == (2, True)


def test_by_default_the_trained_slice_and_those_within_reach_of_it_are_edited() -> None:
    assert slices_around(189, 0.5) == range(90, 99)
    assert slices_around(3, 0.5) == range(1, 2)
    assert slices_around(2, 0.5) == range(1, 2)
    assert slices_around(1, 0.5) == range(1)
    assert slices_around(100, 0.0) == range(3)
    assert slices_around(100, 1.0) == range(97, 100)


def test_slices_are_counted_from_the_lowest_and_must_be_there() -> None:
    path = Path("head.nii")
    assert choose_slices(path, "3:5", 9) == range(3, 6)
    assert choose_slices(path, "0:0", 9) == range(1)
    for text in ("5:3", "0:9", "-1:3", "a:b", "3", "1:2:3", ":"):
        with pytest.raises(RequestError, match="--slices"):
            choose_slices(path, text, 9)
