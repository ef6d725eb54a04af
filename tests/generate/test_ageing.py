"""What editor `drift` draws of one patient over the years, on rendered brains and the project's own base."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from ld_common.diffusion.base_model import BaseModel
from ld_common.release.release import Release, load_release_base, read_release, release_editor
from ld_generate.attribute_sweep import read_sweep
from ld_generate.request import RequestOptions, make_folders, read_requests
from ld_generate.writer import run_edits
from tests.support.ageing import write_ageing_hospital, write_ageing_release

YEARS = 20
"""Of the sweep, from the scan's own age on, in steps of 2."""


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ageing_hospital(tmp_path_factory.mktemp("ageing") / "hospital", patients=20, test_patients=2)


@pytest.fixture(scope="module")
def ageing(hospital: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Release, BaseModel]:
    release = read_release(write_ageing_release(tmp_path_factory.mktemp("release"), hospital))
    return release, load_release_base(release)


@pytest.mark.slow
def test_the_drawn_area_grows_smoothly_with_the_age(
    ageing: tuple[Release, BaseModel], hospital: Path, tmp_path: Path
) -> None:
    """Measured on what is written, every two years: no step back, and no step far from its neighbours'."""
    release, base = ageing
    with (hospital / "held_out/scans.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["input"].endswith("series")]
    for row in rows:
        age = float(row["age"])
        source = {"age": age, "sex": row["sex"], "diagnosis": row["diagnosis"]}
        options = RequestOptions(tmp_path / row["patient"], source, burned_in_text_checked=True)
        sweep = read_sweep(release.modality, f"age={age}:{age + YEARS}:2")
        inputs = [hospital / "held_out" / row["input"]]
        requests = read_requests(base, release, inputs, [], options, sweep)
        make_folders(requests)
        run_edits(base, release, requests, release_editor(release), [0.0], lambda done: None)
        with (requests[0].folder / "sweep_age.csv").open(newline="") as stream:
            scan, _, *answers = [float(line["ventricles_mm2"]) for line in csv.DictReader(stream)]
        growth = np.diff(answers)
        assert answers[0] == pytest.approx(scan, abs=1.0)  # the null edit
        assert (growth > 0).all(), growth
        assert np.abs(np.diff(growth)).max() < growth.mean(), growth
