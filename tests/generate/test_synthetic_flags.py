"""Every image that `ld-generate` writes is flagged as synthetic, with --watermark in its pixels as well."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from ld_common.imaging.secondary_capture import MANUFACTURER
from tests.conftest import write_mr_slice
from tests.support.releases import SOURCE, GenerateRunner

TEXT = (".csv", ".json")


def flag(path: Path) -> str:
    """What an image file says of its origin; fails for an unknown kind of file."""
    if path.name.endswith(".nii.gz"):
        return "YES" if nibabel.load(path).header["descrip"].item().startswith(b"synthetic") else ""
    if path.suffix == ".dcm":
        image = pydicom.dcmread(path)
        return str(image.get("SyntheticData", "")) if image.Manufacturer == MANUFACTURER else ""
    assert path.suffix in (".png", ".gif"), path
    with Image.open(path) as image:
        if path.suffix == ".gif":
            return "YES" if b"SyntheticData=YES" in image.info.get("comment", b"") else ""
        return str(image.info.get("SyntheticData", ""))


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    voxels = np.zeros((60, 70, 3), np.int16)
    voxels[10:50, 10:60] = np.random.default_rng(1).integers(200, 900, (40, 50, 3))
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([3.0, 3.0, 8.0, 1.0])), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


@pytest.fixture
def series(tmp_path: Path) -> Path:
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 900, (70, 60)).astype(np.uint16)
        write_mr_slice(tmp_path / "series" / f"{number}.dcm", pixels, ImagePositionPatient=[0, 0, 4 * number])
    return tmp_path / "series"


@pytest.mark.slow
def test_every_image_that_is_written_says_that_it_is_synthetic(
    run: GenerateRunner,
    volume: Path,
    series: Path,
    tmp_path: Path,
) -> None:
    edit = ["--source", SOURCE, "--target", "age=80"]
    runs: list[list[object]] = [
        ["sweep", "age=60:80:20", "--input", volume, "--source", SOURCE, "--editor", "ddpm", "--num-seeds", "2"],
        ["edit", "--input", series, *edit, "--drift", "0", "--drift", "0.1"],
        ["volume", "--input", series, *edit],
        ["sample", "--source", SOURCE, "--samples", "2"],
    ]
    for number, (command, *arguments) in enumerate(runs):
        code, printed = run(str(command), *arguments, "--out", tmp_path / "out" / str(number))
        assert code == 0, printed
    files = [path for path in (tmp_path / "out").rglob("*.*") if path.is_file() and path.suffix not in TEXT]
    unflagged = {path.name for path in files if flag(path) != "YES"}
    assert unflagged == {"input.png"}
    named = Counter(path.name for path in files)
    wanted = {"reconstruction.png", "age-80_difference.png", "age-80_uncertainty.png", "age-80_seed-1.png"}
    wanted |= {"strip.png", "montage.png", "planes.png", "sweep_age.png", "sweep_age.gif", "sample-2_drift-release.png"}
    assert wanted | {"age-80.png", "age-80.dcm", "age-80.nii.gz", "IM0002.dcm"} <= set(named)


def test_the_mark_is_in_the_pixels_of_every_picture_and_the_files_say_so(
    run: GenerateRunner,
    volume: Path,
    tmp_path: Path,
) -> None:
    options = ["--input", volume, "--source", SOURCE, "--target", "age=80"]
    for name, more in (("plain", []), ("marked", ["--watermark"])):
        code, printed = run("edit", *options, *more, "--out", tmp_path / name)
        assert code == 0, printed
    plain, marked = tmp_path / "plain" / "scan", tmp_path / "marked" / "scan"
    assert (plain / "input.png").read_bytes() == (marked / "input.png").read_bytes()
    corner = slice(55, 70), slice(0, 50)
    for name in ("reconstruction.png", "age-80.png", "age-80_difference.png"):
        before, after = (np.asarray(Image.open(folder / name)).astype(int) for folder in (plain, marked))
        changed = np.abs(before - after).reshape(70, 60, -1).max(-1) > 0
        assert changed[corner].any(), name
        changed[corner] = False
        assert not changed.any(), name
    before, after = (nibabel.load(folder / "age-80.nii.gz").get_fdata()[::-1, ::-1, 0].T for folder in (plain, marked))
    assert (before != after)[corner].any()
    assert (before == after)[:55].all()
    one, other = (pydicom.dcmread(folder / "age-80.dcm") for folder in (plain, marked))
    assert (one.BurnedInAnnotation, other.BurnedInAnnotation) == ("NO", "YES")
    assert one.SOPInstanceUID != other.SOPInstanceUID
    assert '"watermark": true' in (marked / "record.json").read_text()
    assert '"watermark": false' in (plain / "record.json").read_text()


def test_a_picture_too_small_to_be_marked_is_named(
    run: GenerateRunner,
    tmp_path: Path,
) -> None:
    options = ["--source", SOURCE, "--samples", "1", "--watermark", "--out", tmp_path / "out"]
    code, printed = run("sample", *options)
    assert (code, "32 x 32 pixels is too small for --watermark" in printed) == (2, True)
