"""A scan along one attribute: what may be asked, and what the strip, the animation and the table hold."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image

from ld_common.core.config import from_mapping
from ld_common.core.errors import ConfigError, RequestError
from ld_common.imaging import modality
from ld_common.imaging.geometry import Frame
from ld_common.imaging.modality import Modality
from ld_common.metrics import image as metrics
from ld_generate.attribute_sweep import Trajectory, read_sweep, write_sweep

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
        ("age=60:62:0.5", "prompts say whole numbers"),
        ("aeg=60:90:5", "did you mean 'age'"),
        ("sex=1:2:1", "one of F, M"),
    ],
)
def test_what_cannot_be_drawn_is_named(brain_mri: Modality, text: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        read_sweep(brain_mri, text)


def test_strip_animation_and_table_hold_every_value(brain_mri: Modality, tmp_path: Path) -> None:
    trajectory = Trajectory("age", [60.0, 70.0, 80.0])
    scan, *images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    factual = {"age": 66.0, "sex": "F", "diagnosis": "CN"}
    files = write_sweep(tmp_path, brain_mri, trajectory, FRAME, factual, scan, images[0], images)
    assert [file.name for file in files] == ["trajectory_age.png", "trajectory_age.gif", "trajectory_age.csv"]
    with Image.open(files[0]) as strip:
        assert strip.text["SyntheticData"] == "YES"  # type: ignore[attr-defined]
    with Image.open(files[1]) as animation:
        assert animation.n_frames == 4  # type: ignore[attr-defined]  # there and back: 60, 70, 80, 70
        assert b"SyntheticData=YES" in animation.info["comment"]
    rows = list(csv.DictReader(files[2].read_text().splitlines()))
    assert [(row["picture"], float(row["age"])) for row in rows] == [
        ("input", 66.0),
        ("reconstruction", 66.0),
        *(("counterfactual", value) for value in trajectory.values),
    ]
    areas = metrics.ventricle_areas_mm2(torch.stack([scan, images[0], *images]), 6.25)
    assert [float(row["ventricles_mm2"]) for row in rows] == pytest.approx(areas.tolist(), rel=1e-5)
    assert float(rows[1]["mean_change"]) == float(rows[2]["mean_change"]) == 0
    assert float(rows[3]["mean_change"]) == pytest.approx(float((images[1] - images[0]).abs().mean() / 2), rel=1e-5)


def test_without_a_scale_no_area_is_claimed(brain_mri: Modality, tmp_path: Path) -> None:
    frame = Frame(0.0, 1.0, (32, 32), None, 32.0, None)
    picture = torch.zeros(1, 32, 32)
    *_, table = write_sweep(
        tmp_path, brain_mri, Trajectory("age", [60.0, 70.0]), frame, {"age": 66.0}, picture, picture, [picture] * 2
    )
    assert table.read_text().splitlines()[0] == "picture,age,mean_change"


def test_a_modality_names_measures_that_there_are() -> None:
    assert tuple(metrics.BIOMARKERS) == modality.BIOMARKERS
    with pytest.raises(ConfigError, match="did you mean 'heart'"):
        from_mapping(Modality, {"prompt": "a scan", "measures": ["hart"]})
