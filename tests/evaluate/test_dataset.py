"""Reading a folder of evaluation scans."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ld_common.core.errors import RequestError
from ld_common.imaging.geometry import Scan
from ld_common.imaging.modality import Modality
from ld_evaluate.dataset import EvaluationData, read_data
from ld_evaluate.edits import ScanPixels, later_scan


def write_scans(folder: Path, *rows: tuple[str, float, str, str]) -> Path:
    """Grey pictures and their table: patient, age, sex, diagnosis."""
    generator = np.random.default_rng(0)
    lines = []
    for number, (patient, age, sex, diagnosis) in enumerate(rows):
        Image.fromarray(generator.integers(0, 255, (40, 40)).astype(np.uint8)).save(folder / f"{number}.png")
        lines.append([patient, f"{number}.png", age, sex, diagnosis])
    with (folder / "scans.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["patient", "input", "age", "sex", "diagnosis"], *lines])
    return folder


def test_simulated_patients_have_a_truth_for_each_edit_and_a_follow_up(data: EvaluationData) -> None:
    assert len(data.edits) == len(data.truths) > 0
    assert len(data.follow_ups) == len(data.baselines.images) == 2
    for edit, truth in zip(data.edits, data.truths, strict=True):
        assert edit.truth is not None and edit.truth.pixels is not None
        grown = truth.true_area_mm2[1] - truth.true_area_mm2[0]
        assert edit.truth.growth_mm2["ventricles"] == pytest.approx(grown)
    for edit in data.follow_ups:
        assert edit.truth is not None and edit.truth.pixels is not None  # one grid, one position
        assert edit.years == pytest.approx(float(edit.target["age"]) - float(edit.source["age"])) and edit.years > 0
        assert 0 < float((edit.truth.picture - edit.scanned.picture).abs().mean()) < 0.2


def test_scans_without_a_truth_are_edited_to_every_category_and_later_ages(brain_mri: Modality, tmp_path: Path) -> None:
    folder = write_scans(tmp_path, ("a", 70, "F", "CN"), ("b", 95, "M", "AD"), ("a", 73, "F", "CN"))
    data = read_data(folder, brain_mri, 32)
    (later,) = data.follow_ups
    assert (data.baselines.patients, later.patient, later.scan, later.target) == (["a", "b"], "a", 0, {"age": 73.0})
    assert later.truth is not None and not later.truth.growth_mm2  # a PNG has no spacing, so nothing is measured
    assert {(edit.scan, edit.name) for edit in data.edits} == {
        (0, "age_plus_10"),
        (0, "age_plus_20"),
        (0, "sex_M"),
        (0, "diagnosis_AD"),
        (1, "sex_F"),
        (1, "diagnosis_CN"),
    }
    assert not data.truths and all(edit.truth is None for edit in data.edits)


def test_a_follow_up_of_another_grid_has_no_pixels_to_be_compared(brain_mri: Modality) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.uniform(0, 100, (40, 40)).astype(np.float32)
    baseline = ScanPixels.of(Scan(pixels, (5.0, 5.0), {}, np.eye(4)), brain_mri, 32)
    brighter = Scan(3 * pixels + 7, (5.0, 5.0), {}, np.eye(4))
    truth = later_scan(baseline, brighter, brain_mri)
    assert truth.pixels is not None
    np.testing.assert_allclose(truth.pixels, pixels, atol=1e-3)  # another scale of grey levels is no change
    assert truth.growth_mm2 == pytest.approx({"ventricles": 0.0}, abs=1e-3)
    moved = np.eye(4)
    moved[0, 3] = 4.0
    for other in (
        Scan(pixels, (5.0, 5.0), {}, moved),
        Scan(pixels, (4.0, 5.0), {}, np.eye(4)),
        Scan(pixels[:-1], (5.0, 5.0), {}, np.eye(4)),
    ):
        assert later_scan(baseline, other, brain_mri).pixels is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient,input,age,sex\na,0.png,70,F\n", "row 1.*diagnosis"),
        ("patient,input,age,sex,diagnosis\na,0.png,7,F,CN\n", "age=7"),
        ("patient,input,age,sex,diagnosis\n", "no row"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(brain_mri: Modality, tmp_path: Path, text: str, message: str) -> None:
    write_scans(tmp_path, ("a", 70, "F", "CN"))
    (tmp_path / "scans.csv").write_text(text)
    with pytest.raises(RequestError, match=message):
        read_data(tmp_path, brain_mri, 32)


def test_visits_out_of_order_are_refused(brain_mri: Modality, tmp_path: Path) -> None:
    folder = write_scans(tmp_path, ("a", 73, "F", "CN"), ("a", 70, "F", "CN"))
    with pytest.raises(RequestError, match=r"patient a .*order"):
        read_data(folder, brain_mri, 32)


def test_a_table_that_contradicts_its_scans_is_refused(hospital: Path, brain_mri: Modality, tmp_path: Path) -> None:
    folder = shutil.copytree(hospital / "held_out", tmp_path / "held_out")
    with (folder / "scans.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for wrong, message in (
        ([row | {"age": str(float(row["age"]) + 5)} for row in rows], "age is"),
        (rows[:2], "1 and 2 patients"),
        (rows[1::2], "first scans of patient"),  # follow-ups alone
    ):
        with (folder / "scans.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(wrong)
        with pytest.raises(RequestError, match=message):
            read_data(folder, brain_mri, 32)


def test_truths_that_cannot_be_read_are_refused(hospital: Path, brain_mri: Modality, tmp_path: Path) -> None:
    folder = shutil.copytree(hospital / "held_out", tmp_path / "held_out")
    next(folder.rglob("truth/age_plus_10.npz")).unlink()
    with pytest.raises(RequestError, match=r"held_out\.json"):
        read_data(folder, brain_mri, 32)
