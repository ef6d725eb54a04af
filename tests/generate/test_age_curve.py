"""A sweep over age: its band, the cohort's curve, the table's columns and the plot."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ld_common.imaging.geometry import Frame
from ld_common.imaging.modality import Modality
from ld_common.metrics.bands import Band
from ld_common.metrics.cohort import CohortCurve
from ld_common.release.release import read_manifest, write_manifest
from ld_generate.age_curve import AgeContext, AgeCurve, write_age_curve
from ld_generate.attribute_sweep import Sweep
from ld_generate.sweep_writer import SweepPictures, write_sweep
from tests.support.releases import SOURCE, GenerateRunner, write_scan

BAND = Band(30.0, 8.0, 2.0, 0.9, 40, 90, 12.0, True)
CURVE = CohortCurve({"diagnosis": "CN", "sex": "F"}, [1500.0, 250.0, 20.0], -300.0, 400.0, 0.9, 60.0, 90.0, 20)
EVALUATION: dict[str, Any] = {
    "editor": "drift",
    "bands": {
        "biomarker": "ventricles",
        "one_scan": BAND.state(),
        "history": BAND.state() | {"factor": 1.0, "least_spread_years2": 4.0},
    },
    "cohort": {"biomarker": "ventricles", "curves": [CURVE.state()]},
}


@pytest.fixture(scope="module")
def judged(longitudinal: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The longitudinal release with an evaluation."""
    folder = tmp_path_factory.mktemp("judged") / "release"
    shutil.copytree(longitudinal, folder)
    write_manifest(folder, read_manifest(folder) | {"evaluation": EVALUATION})
    return folder


def test_columns_hold_the_band_around_each_answer_and_the_cohort_at_each_age() -> None:
    curve = AgeCurve(
        "ventricles", (70.0, 1500.0), [60.0, 70.0, 80.0, 95.0], [10.0, 1500.0, 1800.0, 2000.0], AgeContext(BAND, CURVE)
    )
    columns = curve.columns()
    assert columns["band"] == ["", "", "extrapolated", "judged", "judged", "extrapolated"]
    assert columns["ventricles_mm2_low"][:3] == ["", "", "0"]  # no negative area
    width = 2 * math.hypot(30, 80)
    assert float(columns["ventricles_mm2_low"][4]) == pytest.approx(1800 - width, rel=1e-5)
    assert float(columns["ventricles_mm2_high"][4]) == pytest.approx(1800 + width, rel=1e-5)
    assert float(columns["ventricles_mm2_high"][3]) == 1560
    assert columns["cohort_ventricles_mm2"] == ["1500", "1500", "1270", "1500", "1770", ""]
    assert columns["cohort_ventricles_mm2_high"][4] == "2170"
    empty = AgeCurve("ventricles", (70.0, 1500.0), [60.0], [1400.0], AgeContext()).columns()
    assert list(empty) == list(columns)
    assert {cell for column in empty.values() for cell in column} == {""}


@pytest.mark.slow
@pytest.mark.parametrize(
    "context", [AgeContext(), AgeContext(BAND, CURVE, [(66.0, 1400.0)]), AgeContext(None, CURVE), AgeContext(BAND)]
)
def test_the_plot_says_that_it_is_synthetic(context: AgeContext, tmp_path: Path) -> None:
    curve = AgeCurve("ventricles", (70.0, 1500.0), [72.0, 76.0], [1550.0, 1700.0], context)
    with Image.open(write_age_curve(tmp_path / "curve.png", curve)) as plot:
        assert plot.text["SyntheticData"] == "YES"  # type: ignore[attr-defined]
        assert plot.width > 900


def test_a_sweep_of_no_spacing_or_of_another_attribute_has_no_curve(brain_mri: Modality, tmp_path: Path) -> None:
    picture = torch.rand(1, 32, 32)
    for spacing, context in ((None, AgeContext(BAND)), ((1.0, 1.0), None)):
        files = write_sweep(
            tmp_path,
            brain_mri,
            Sweep("age", [60.0, 70.0]),
            Frame(0.0, 1.0, (32, 32), spacing, 32.0, None),
            {"age": 66.0},
            SweepPictures(picture, picture, [picture] * 2),
            context,
        )
        assert [file.suffix for file in files] == [".png", ".gif", ".csv"]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep_age.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_a_sweep_over_age_takes_the_band_of_the_signed_evaluation(
    run: GenerateRunner, judged: Path, scan: Path, tmp_path: Path
) -> None:
    arguments = ("sweep", "age=74:94:5", "--input", scan, "--source", SOURCE)
    code, printed = run(*arguments, "--out", tmp_path / "out", release=judged)
    assert code == 0, printed
    assert "no evaluation" not in printed and "within 171 mm2" in " ".join(printed.split())
    folder = tmp_path / "out" / "scan"
    assert (folder / "sweep_age_curve.png").exists()
    rows = rows_of(folder)
    assert [row["band"] for row in rows] == ["", "", "judged", "judged", "judged", "extrapolated", "extrapolated"]
    for row in rows[2:]:
        width = float(BAND.half_width(float(row["age"]) - 74))
        assert float(row["ventricles_mm2_high"]) - float(row["ventricles_mm2"]) == pytest.approx(width, abs=0.1)
        change = float(row["ventricles_mm2"]) - float(rows[0]["ventricles_mm2"])
        assert float(row["ventricles_change_mm2"]) == pytest.approx(change, abs=0.1)
    assert float(rows[0]["cohort_ventricles_mm2"]) == pytest.approx(float(CURVE.at(74.0)), rel=1e-4)
    record = json.loads((folder / "record.json").read_text())
    entries = [entry["band"] for entry in record["counterfactuals"]]
    assert entries[0] is None  # the scan's own age is no edit
    assert entries[1]["kind"] == "judged" and entries[4]["kind"] == "extrapolated"
    assert entries[1]["high_mm2"] == pytest.approx(float(rows[3]["ventricles_mm2_high"]), rel=1e-4)


@pytest.mark.slow
def test_what_was_not_judged_gets_no_band_and_a_note(
    run: GenerateRunner, longitudinal: Path, judged: Path, scan: Path, tmp_path: Path
) -> None:
    arguments = ("sweep", "age=74:84:5", "--input", scan, "--source", SOURCE, "--out", tmp_path / "out")
    for release, further, words in (
        (longitudinal, (), "no evaluation with bands"),
        (judged, ("time_scale=2",), "with other options"),
        (judged, ("--rendering", "decoded"), "not decoded"),
    ):
        code, printed = run(*arguments, *further, release=release)
        assert code == 0, printed
        assert words in " ".join(printed.split())
        rows = rows_of(tmp_path / "out" / "scan")
        assert {row["ventricles_mm2_low"] + row["band"] for row in rows} == {""}
        assert all(row["ventricles_change_mm2"] for row in rows)
        assert (tmp_path / "out" / "scan" / "sweep_age_curve.png").exists()
    code, _ = run(*arguments, "batch_size=3", release=judged)
    assert code == 0 and rows_of(tmp_path / "out" / "scan")[2]["band"] == "judged"


@pytest.mark.slow
def test_earlier_scans_narrow_the_band_where_such_histories_were_judged(
    run: GenerateRunner, judged: Path, tmp_path: Path
) -> None:
    visits = [
        write_scan(tmp_path / f"{year}.dcm", StudyDate=f"{year}0101", PatientID="P1") for year in (2014, 2019, 2020)
    ]
    arguments = ("sweep", "age=75:85:5", "--input", visits[2], "--source", SOURCE, "--out", tmp_path / "out")
    widths = {}
    for year, history in (("long", visits[0]), ("short", visits[1])):
        code, printed = run(*arguments, "--history", history, release=judged)
        assert code == 0, printed
        row = rows_of(tmp_path / "out" / "2020")[-1]
        widths[year] = float(row["ventricles_mm2_high"]) - float(row["ventricles_mm2"])
        assert ("visits lie nearer together" in " ".join(printed.split())) == (year == "short")
    assert widths["short"] == pytest.approx(2 * widths["long"], rel=1e-3)


def test_an_edit_of_the_age_alone_records_its_band(
    run: GenerateRunner, judged: Path, scan: Path, tmp_path: Path
) -> None:
    arguments = ("edit", "--input", scan, "--source", SOURCE, "--out", tmp_path / "out")
    targets = ("--target", "age=84", "--target", "age=84,diagnosis=AD", "--target", "sex=M")
    code, printed = run(*arguments, *targets, release=judged)
    assert code == 0, printed
    record = json.loads((tmp_path / "out" / "scan" / "record.json").read_text())
    band, *others = [entry["band"] for entry in record["counterfactuals"]]
    assert others == [None, None]
    assert (
        band["high_mm2"] - band["low_mm2"] == pytest.approx(2 * BAND.half_width(10.0), rel=1e-3) or not band["low_mm2"]
    )
