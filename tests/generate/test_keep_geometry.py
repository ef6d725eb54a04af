"""`--keep-geometry`: DICOM answers that lie where their scan does, for whoever wants them linked to it."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from tests.conftest import write_mr_slice
from tests.support.releases import SOURCE, GenerateRunner, write_scan

FRAME = "1.2.826.0.1.3680043.8.498.7"
TURNED = [-1, 0, 0, 0, -0.96, 0.28]
"""Columns run to the right and rows to the front, tilted about the ears."""
COMMON = ("--source", SOURCE, "--target", "age=84")


def corners(path: Path) -> np.ndarray:
    """Patient coordinates, in mm, of the first pixel and of the ends of its row and column, `(3,3)`."""
    image = pydicom.dcmread(path)
    row, column = np.array(image.ImageOrientationPatient, float).reshape(2, 3)
    down, right = map(float, image.PixelSpacing)
    origin = np.array(image.ImagePositionPatient, float)
    return np.stack([origin, origin + row * right * (image.Columns - 1), origin + column * down * (image.Rows - 1)])


@pytest.mark.parametrize("orientation", [[1, 0, 0, 0, 1, 0], TURNED])
def test_the_answer_lies_where_the_scan_does(run: GenerateRunner, tmp_path: Path, orientation: list[float]) -> None:
    place = {"ImageOrientationPatient": orientation, "ImagePositionPatient": [-10.5, 20.25, 33]}
    scan = write_scan(tmp_path / "scan.dcm", FrameOfReferenceUID=FRAME, PixelSpacing=[1.5, 2.0], **place)
    code, output = run("edit", "--input", scan, *COMMON, "--keep-geometry", "--out", tmp_path / "out")
    assert code == 0, output
    answer = pydicom.dcmread(tmp_path / "out/scan/age-84.dcm")
    assert (answer.FrameOfReferenceUID, answer.SyntheticData) == (FRAME, "YES")
    before, after = corners(scan), corners(tmp_path / "out/scan/age-84.dcm")
    if orientation == TURNED:  # answers are upright: their first pixel is the scan's last
        last = before[1] + before[2] - before[0]
        assert np.allclose(after, [last, before[2], before[1]], atol=1e-3)
    else:
        assert np.allclose(after, before, atol=1e-3)


def test_without_it_nothing_links_the_answer_to_the_scan(run: GenerateRunner, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "scan.dcm", FrameOfReferenceUID=FRAME, ImagePositionPatient=[-10.5, 20.25, 33])
    answers = {}
    for name, options in (("plain", ()), ("placed", ("--keep-geometry",))):
        code, output = run("edit", "--input", scan, *COMMON, *options, "--out", tmp_path / name)
        assert code == 0, output
        answers[name] = pydicom.dcmread(tmp_path / name / "scan/age-84.dcm")
    assert "FrameOfReferenceUID" not in answers["plain"]
    assert "ImagePositionPatient" not in answers["plain"]
    files = [path for path in (tmp_path / "plain").rglob("*") if path.is_file()]
    assert files and not any(FRAME.encode() in path.read_bytes() for path in files)
    assert FRAME not in (tmp_path / "placed/scan/record.json").read_text()
    assert json.loads((tmp_path / "placed/scan/record.json").read_text())["keep_geometry"] is True
    for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID"):
        assert answers["plain"][name].value != answers["placed"][name].value


@pytest.mark.slow
def test_a_series_keeps_its_frame_of_reference_only_when_asked_to(run: GenerateRunner, tmp_path: Path) -> None:
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 900, (70, 60)).astype(np.uint16)
        place = {"FrameOfReferenceUID": FRAME, "ImagePositionPatient": [1, 2, 4 * number]}
        write_mr_slice(tmp_path / "series" / f"{number}.dcm", pixels, **place)
    series = tmp_path / "series"
    for name, options in (("plain", ()), ("placed", ("--keep-geometry",))):
        code, output = run("volume", "--input", series, *COMMON, *options, "--out", tmp_path / name)
        assert code == 0, output
        written = sorted((tmp_path / name / "series/age-84").iterdir())
        frames = {pydicom.dcmread(path).FrameOfReferenceUID for path in written}
        assert len(frames) == 1
        assert (frames == {FRAME}) == (name == "placed")
        positions = [list(map(float, pydicom.dcmread(path).ImagePositionPatient)) for path in written]
        assert positions == [[1, 2, 0], [1, 2, 4], [1, 2, 8]]


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")  # of the test file that is written
def test_what_lies_in_no_frame_of_reference_is_refused(run: GenerateRunner, tmp_path: Path) -> None:
    bare = write_scan(tmp_path / "bare.dcm")
    wrong = write_scan(tmp_path / "wrong.dcm", FrameOfReferenceUID="Anna Example")
    voxels = np.random.default_rng(0).random((40, 40, 3)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([3.0, 3.0, 8.0, 1.0])), tmp_path / "head.nii.gz")
    for command, path in (("edit", bare), ("edit", wrong), ("volume", tmp_path / "head.nii.gz")):
        code, output = run(command, "--input", path, *COMMON, "--keep-geometry", "--out", tmp_path / "out")
        assert code == 2, output
        assert "Frame of Reference UID" in " ".join(output.split())
        assert not (tmp_path / "out").exists()
