"""`ld-generate volume` with earlier volumes of the patient: which slices are compared, and what is refused."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from ld_common.core.errors import RequestError
from ld_common.imaging.volume import Volume
from ld_generate.volume_history import matching_places, slice_at
from tests.conftest import write_mr_slice
from tests.support.brains import brain
from tests.support.releases import SOURCE, GenerateRunner

PATH = Path("earlier.nii.gz")
CHECKED = "--burned-in-text-checked"  # looking for text in each slice takes long


def volume(shape: tuple[int, int, int] = (20, 24, 40), sides: Any = (2.0, 2.0, 3.0), turn: float = 0.0) -> Volume:
    """Voxels that count slices from 0, the lowest; turned about the axis to the right, in degrees."""
    voxels = np.zeros(shape, np.float32) + np.arange(shape[2], dtype=np.float32)
    cos, sin = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ np.diag(sides)
    return Volume(voxels, affine, {}, None)


def places(now: Volume, earlier: Volume, edited: range, position: float = 0.5) -> list[float]:
    return [float(place) for place in matching_places(PATH, now, earlier, edited, position)]


def test_volumes_of_one_grid_are_compared_slice_by_slice() -> None:
    assert places(volume(), volume(), range(18, 22)) == [18, 19, 20, 21]
    assert places(volume(), volume(), range(0, 40, 39), 0.2) == [0, 39]


def test_other_distances_between_slices_are_counted_from_the_trained_slice() -> None:
    thin = volume((20, 24, 61), (2.0, 2.0, 2.0))
    assert places(volume((20, 24, 41)), thin, range(19, 22)) == [28.5, 30, 31.5]
    between = slice_at(thin, 28.5)
    assert np.all(between.pixels == 28.5)
    assert np.all(slice_at(thin, 60.0).pixels == 60)


@pytest.mark.parametrize(
    ("earlier", "edited", "words"),
    [
        (volume((20, 24, 13), (2.0, 2.0, 9.0)), range(18, 22), "voxels of 2 x 2 x 9 mm and the scan of 2 x 2 x 3 mm"),
        (volume((20, 24, 40), (5.0, 5.0, 3.0)), range(18, 22), "their slices do not compare"),
        (volume(turn=20.0), range(18, 22), "turned by 20°"),
        (volume((20, 24, 50)), range(18, 22), "covers 150 mm from bottom to top and the scan 120 mm"),
        (volume((20, 24, 37)), range(40), "does not reach all edited slices"),
    ],
)
def test_volumes_whose_slices_do_not_compare_are_refused_with_the_remedy(
    earlier: Volume, edited: range, words: str
) -> None:
    with pytest.raises(RequestError, match="register it rigidly") as refused:
        matching_places(PATH, volume(), earlier, edited, 0.5)
    assert words in str(refused.value)


def test_a_slice_says_whose_it_is_and_of_what_day() -> None:
    named = Volume(np.zeros((20, 20, 3), np.float32), np.eye(4), {}, None, "", "P1", datetime.date(2020, 1, 1))
    assert (named.scan(1).patient_id, named.scan(1).study_date) == ("P1", datetime.date(2020, 1, 1))


def write_nifti(path: Path, age: float, count: int = 9) -> Path:
    """Of a patient of this age: the same brain in all slices, which differ by noise."""
    slices = [brain(700, age)[::-1, ::-1].T + number % 3 for number in range(count)]
    nibabel.save(nibabel.Nifti1Image(np.stack(slices, -1).astype(np.int16), np.diag([1.9, 1.9, 3, 1])), path)
    return path


def write_series(folder: Path, age: float, **elements: Any) -> Path:
    for number in range(7):
        place = {"ImagePositionPatient": [-90, -100.5, 4 * number], "PixelSpacing": [1.9, 1.9]}
        write_mr_slice(folder / f"{number}.dcm", brain(700, age) + np.uint16(number % 3), **place, **elements)
    return folder


@pytest.mark.slow
def test_earlier_volumes_change_the_answer_of_all_slices_alike_and_are_recorded(
    run: GenerateRunner, informed: Path, tmp_path: Path
) -> None:
    now, before, first = (write_nifti(tmp_path / f"{age}.nii.gz", age) for age in (74, 70, 66))
    common = ("volume", "--input", now, "--source", SOURCE, "--target", "age=80", "--slices", "3:5", CHECKED)
    assert run(*common, "--out", tmp_path / "alone", release=informed)[0] == 0
    history = ("--history", f"{before}@70", "--history", f"{first}@66")
    code, output = run(*common, *history, "batch_size=2", "--out", tmp_path / "told", release=informed)
    assert code == 0, output
    alone, told = (json.loads((tmp_path / name / "74/record.json").read_text()) for name in ("alone", "told"))
    assert alone["history"] == []
    assert [visit["years_before"] for visit in told["history"]] == [8, 4]
    assert all(visit["slices"] == {"first": 3, "last": 5} for visit in told["history"])
    assert len({visit["hmac_of_pictures"] for visit in told["history"]}) == 2
    drawn = [nibabel.load(tmp_path / name / "74/age-80.nii.gz").get_fdata() for name in ("alone", "told")]
    assert np.abs(drawn[1] - drawn[0]).max() > 1
    code, output = run(*common, "--history", before, "--out", tmp_path / "out", release=informed)
    assert (code, "give the age, as SCAN@AGE" in " ".join(output.split())) == (2, True)


@pytest.mark.slow
def test_a_history_of_series_takes_dates_and_refuses_another_patient(
    run: GenerateRunner, informed: Path, release: Path, tmp_path: Path
) -> None:
    now = write_series(tmp_path / "now", 74, StudyDate="20200101", PatientID="P1")
    before = write_series(tmp_path / "before", 70, StudyDate="20160101", PatientID="P1")
    other = write_series(tmp_path / "other", 70, StudyDate="20160101", PatientID="P2")
    recent = write_series(tmp_path / "recent", 74, StudyDate="20191201", PatientID="P1")
    common = ("volume", "--input", now, "--source", SOURCE, "--target", "age=80", "--slices", "3:3", CHECKED)
    out = tmp_path / "out"
    for arguments, where, words in (
        (("--history", other), informed, "another patient"),
        (("--history", f"{before}@40"), informed, "contradicts the dates"),
        (("--history", before / "0.dcm"), informed, "not a volume"),
        (("--history", before), release, "takes no history"),
        (("--history", before, "--editor", "ddim"), informed, "takes no history"),
    ):
        code, output = run(*common, *arguments, "--out", out, release=where)
        assert code == 2, output
        assert words in " ".join(output.split())
    code, output = run(*common, "--history", recent, "--out", out, release=informed)
    assert code == 0, output
    assert "too short to say" in " ".join(output.split())
    record = json.loads((out / "now/record.json").read_text())
    assert [visit["years_before"] for visit in record["history"]] == [pytest.approx(0.085, abs=0.001)]
    assert "P1" not in (out / "now/record.json").read_text()
