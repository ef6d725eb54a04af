"""`ld-generate sweep`: the values that it takes, and what the strip, the animation and the table hold."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image

from ld_common.core.errors import RequestError
from ld_common.imaging.geometry import Frame
from ld_common.imaging.modality import Modality
from ld_common.metrics.biomarkers import ventricle_areas_mm2
from ld_generate.attribute_sweep import Sweep, read_sweep
from ld_generate.sweep_writer import SweepPictures, write_sweep
from tests.support.releases import SOURCE, GenerateRunner

FRAME = Frame(0.0, 1.0, (32, 32), (6.25, 6.25), 200.0, None)


def test_it_is_read_from_first_to_last(brain_mri: Modality) -> None:
    assert read_sweep(brain_mri, "age=60:90:5").values == [60, 65, 70, 75, 80, 85, 90]
    assert read_sweep(brain_mri, "age=90:60:-15").values == [90, 75, 60]
    assert read_sweep(brain_mri, "age=60:63:2").targets == [{"age": 60.0}, {"age": 62.0}]
    assert read_sweep(brain_mri, "age=60:63.3:1.1").values == [60.0, 61.1, 62.2, 63.3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("age", "is not of the form"),
        ("age=60:90", "is not of the form"),
        ("age=60:90:0", "is not of the form"),
        ("age=60:inf:1", "is not of the form"),
        ("age=60:nan:1", "is not of the form"),
        ("age=60:90:x", "is not of the form"),
        ("age=90:60:5", "0 values"),
        ("age=60:90:40", "1 values"),
        ("age=60:90:0.001", "30001 values"),
        ("age=60:130:10", "within 18 to 100"),
        ("age=60:62:0.5", "whole numbers"),
        ("aeg=60:90:5", "did you mean 'age'"),
        ("sex=1:2:1", "F, M"),
    ],
)
def test_what_cannot_be_drawn_is_named(brain_mri: Modality, text: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        read_sweep(brain_mri, text)


def test_strip_animation_and_table_hold_every_value(brain_mri: Modality, tmp_path: Path) -> None:
    sweep = Sweep("age", [60.0, 70.0, 80.0])
    scan, *images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    source = {"age": 66.0, "sex": "F", "diagnosis": "CN"}
    pictures = SweepPictures(scan, images[0], images, "reconstruction")
    files = write_sweep(tmp_path, brain_mri, sweep, FRAME, source, pictures)
    assert [file.name for file in files] == ["sweep_age.png", "sweep_age.gif", "sweep_age.csv"]
    with Image.open(files[0]) as strip:
        assert strip.text["SyntheticData"] == "YES"  # type: ignore[attr-defined]
    with Image.open(files[1]) as animation:
        assert animation.n_frames == 4  # type: ignore[attr-defined]  # there and back: 60, 70, 80, 70
        assert b"SyntheticData=YES" in animation.info["comment"]
    rows = list(csv.DictReader(files[2].read_text().splitlines()))
    assert [(row["picture"], float(row["age"])) for row in rows] == [
        ("input", 66.0),
        ("reconstruction", 66.0),
        *(("counterfactual", value) for value in sweep.values),
    ]
    areas = ventricle_areas_mm2(torch.stack([scan, images[0], *images]), 6.25)
    assert [float(row["ventricles_mm2"]) for row in rows] == pytest.approx(areas.tolist(), rel=1e-5)
    assert float(rows[1]["mean_change"]) == float(rows[2]["mean_change"]) == 0
    write_sweep(tmp_path, brain_mri, sweep, FRAME, source, SweepPictures(scan, images[0], images))
    with next(file for file in files if file.suffix == ".csv").open() as stream:
        from_scan = list(csv.DictReader(stream))
    assert float(from_scan[0]["mean_change"]) == 0 < float(from_scan[2]["mean_change"])
    assert float(rows[3]["mean_change"]) == pytest.approx(float((images[1] - images[0]).abs().mean() / 2), rel=1e-5)


def test_without_a_scale_no_area_is_claimed(brain_mri: Modality, tmp_path: Path) -> None:
    frame = Frame(0.0, 1.0, (32, 32), None, 32.0, None)
    picture = torch.zeros(1, 32, 32)
    *_, table = write_sweep(
        tmp_path,
        brain_mri,
        Sweep("age", [60.0, 70.0]),
        frame,
        {"age": 66.0},
        SweepPictures(picture, picture, [picture] * 2),
    )
    assert table.read_text().splitlines()[0] == "picture,age,mean_change"


@pytest.mark.slow
def test_a_scan_is_drawn_at_each_value(run: GenerateRunner, scan: Path, tmp_path: Path) -> None:
    code, printed = run("sweep", "age=60:80:20", "--input", scan, "--source", SOURCE, "--out", tmp_path / "out")
    assert code == 0, printed
    names = {path.name for path in (tmp_path / "out" / "scan").iterdir()}
    assert {"age-60.dcm", "age-80.png", "sweep_age.png", "sweep_age.gif", "sweep_age.csv", "record.json"} <= names
