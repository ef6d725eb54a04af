from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_modality_lut

from ld_common.core.errors import ScanError
from ld_common.imaging.dicom import read_headers
from ld_common.imaging.rejection import Rejection, ScanRejected
from ld_common.imaging.secondary_capture import Place, Provenance, write_synthetic_dicom

PIXELS = np.random.default_rng(0).normal(300, 100, (20, 30)).astype(np.float32)


def write(path: Path, pixels: np.ndarray = PIXELS, **changes: Any) -> pydicom.Dataset:
    arguments: dict[str, Any] = {"spacing_mm": (1.5, 2.0), "description": "counterfactual: age=84"}
    drawn_by = {"model_name": "tiny base", "model_digest": "ab" * 32, "seed": 1, "request": "scan one"}
    drawn_by |= {name: changes.pop(name) for name in list(changes) if name in drawn_by}
    write_synthetic_dicom(path, pixels, **(arguments | changes), provenance=Provenance(**drawn_by))
    return pydicom.dcmread(path)


@pytest.mark.parametrize(
    "pixels",
    [PIXELS, PIXELS * 1e-6, PIXELS * 1e7 - 1e9, -PIXELS, np.full_like(PIXELS, 3.25), np.zeros_like(PIXELS)],
)
def test_values_come_back_to_within_half_a_stored_step(pixels: np.ndarray, tmp_path: Path) -> None:
    dataset = write(tmp_path / "a.dcm", pixels)
    values = apply_modality_lut(dataset.pixel_array, dataset)
    assert np.abs(values - pixels.astype(np.float64)).max() <= float(dataset.RescaleSlope) * 0.5001
    if np.ptp(pixels) > 0:
        assert float(dataset.RescaleSlope) < np.ptp(pixels) / 60000


def test_it_says_everywhere_that_it_is_synthetic(tmp_path: Path) -> None:
    dataset = write(tmp_path / "a.dcm")
    assert dataset.SyntheticData == "YES"
    assert list(dataset.ImageType[:2]) == ["DERIVED", "SECONDARY"]
    assert dataset.SOPClassUID.name.startswith("Secondary Capture")
    assert (dataset.ContentQualification, dataset.BurnedInAnnotation) == ("RESEARCH", "NO")
    assert "counterfactual: age=84" in dataset.DerivationDescription
    purposes = [item.PurposeOfReferenceCodeSequence[0] for item in dataset.ContributingEquipmentSequence]
    assert ("109100", "DCM") in [(purpose.CodeValue, purpose.CodingSchemeDesignator) for purpose in purposes]
    assert list(dataset.PixelSpacing) == [1.5, 2.0]
    with pytest.raises(ScanRejected) as caught:
        read_headers(tmp_path / "a.dcm", ("OT",), released=True)
    assert caught.value.rejection == Rejection.SYNTHETIC


def test_it_holds_no_date_no_time_and_no_one(tmp_path: Path) -> None:
    dataset = write(tmp_path / "a.dcm")
    dated = [element.keyword for element in dataset.iterall() if element.VR in ("DA", "TM", "DT") and element.value]
    assert dated == []
    assert dataset.PatientID.startswith("SYNTHETIC-")
    assert (dataset.PatientBirthDate, dataset.PatientSex, dataset.AccessionNumber) == ("", "", "")
    assert "SourceImageSequence" not in dataset


def test_the_same_arguments_give_the_same_bytes_and_others_another_identity(tmp_path: Path) -> None:
    first = write(tmp_path / "a.dcm")
    write(tmp_path / "b.dcm")
    assert (tmp_path / "a.dcm").read_bytes() == (tmp_path / "b.dcm").read_bytes()
    other = write(tmp_path / "c.dcm", PIXELS + 1)
    assert other.SOPInstanceUID != first.SOPInstanceUID
    assert (other.StudyInstanceUID, other.PatientID) == (first.StudyInstanceUID, first.PatientID)
    for changes in ({"seed": 2}, {"request": "scan two"}, {"model_digest": "cd" * 32}):
        another = write(tmp_path / "d.dcm", **changes)
        assert another.StudyInstanceUID != first.StudyInstanceUID
        assert another.PatientID != first.PatientID


@pytest.mark.parametrize("orientation", [("L", "F"), None])
def test_it_says_how_a_picture_lies_where_that_is_known(orientation: tuple[str, str] | None, tmp_path: Path) -> None:
    written = write(tmp_path / "a.dcm", orientation=orientation).PatientOrientation
    assert list(written or []) == list(orientation or [])


def test_words_of_any_language_survive(tmp_path: Path) -> None:
    assert write(tmp_path / "a.dcm", description="Größe, 健常").SeriesDescription == "Größe, 健常"


def test_what_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match="not finite"):
        write(tmp_path / "a.dcm", np.array([[np.nan, 1.0]], np.float32))
    with pytest.raises(ScanError, match="cannot write"):
        write(tmp_path / "absent" / "a.dcm")


def test_a_slice_lies_where_it_is_placed_on_the_scale_of_its_series(tmp_path: Path) -> None:
    written = [write(tmp_path / f"{number}.dcm", place=placed(number)) for number in (1, 2)]
    first, second = written
    assert first.SOPInstanceUID != second.SOPInstanceUID  # though their pixels are the same
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "RescaleSlope", "WindowWidth"):
        assert first[name].value == second[name].value
    assert list(first.ImagePositionPatient) == [-10, -20, 30]
    assert list(second.ImagePositionPatient) == [-10, -20, 34]
    assert list(first.ImageOrientationPatient) == pytest.approx([1, 0, 0, 0, 0.6, 0.8])
    assert (first.SpacingBetweenSlices, second.InstanceNumber) == (4, 2)
    assert "; of the input; synthesised by" in first.DerivationDescription
    values = apply_modality_lut(second.pixel_array, second)
    assert np.abs(values - PIXELS).max() <= float(second.RescaleSlope) * 0.5001
    assert float(second.RescaleSlope) == pytest.approx(2000 / 65000)


def placed(number: int) -> Place:
    affine = np.array([[-2.0, 0, 0, 10], [0, -0.9, 0, 20], [0, 1.2, 1, 26 + 4 * number], [0, 0, 0, 1]])
    return Place(number, affine, 4.0, (-1000.0, 1000.0), "of the input")


def test_what_is_burned_in_is_said(tmp_path: Path) -> None:
    assert write(tmp_path / "a.dcm", marked=True).BurnedInAnnotation == "YES"


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian's dicom3tools) is not installed")
@pytest.mark.parametrize("changes", [{}, {"spacing_mm": None}, {"marked": True}, {"place": placed(1)}])
def test_dciodvfy_finds_no_error(changes: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "a.dcm", **changes)
    done = subprocess.run(["dciodvfy", tmp_path / "a.dcm"], capture_output=True, text=True, check=False)
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")]
    # Debian's version is older than SyntheticData (0008,001C), a standard attribute since 2023
    assert [line for line in errors if "(0x0008,0x001c)" not in line] == []
