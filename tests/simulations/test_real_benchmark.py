"""The benchmark on real scans, on files of the same form: real ones are not part of the project."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import load_base
from ld_evaluate.files import COPY
from ld_simulations.benchmarks.real.meshnet import COLOURS, MODEL, MeshNet
from ld_simulations.benchmarks.real.plan import RADIOGRAPHS, VOLUMES, WEIGHTS, RealBenchmark, load_real_benchmark
from ld_simulations.benchmarks.real.radiographs import BLEND, DRIFT, ROWS, judge, read_visits
from ld_simulations.benchmarks.real.report import lines_of, numbers_of, over_db
from ld_simulations.benchmarks.real.run import run

CONFIG = Path(__file__).parents[2] / "configs/benchmark_real.yaml"
COLUMNS = ("patient_id", "image_id", "sex", "admission_offset", "projection", "crp_val")
PATIENTS, DAYS = 10, (-2, 0, 0, 5)
"""Each patient has two images on day 0."""


@pytest.fixture(scope="module")
def benchmark(smallest_base: Path, tmp_path_factory: pytest.TempPathFactory) -> RealBenchmark:
    folder = tmp_path_factory.mktemp("real")
    write_radiographs(folder / "data" / RADIOGRAPHS)
    write_brains(folder / "data" / VOLUMES)
    write_meshnet(folder / "data" / WEIGHTS)
    overrides = [f"output={folder / 'out'}", f"results={folder}", f"data={folder / 'data'}"]
    return load_real_benchmark(CONFIG, [*overrides, f"base_model={smallest_base}"])


def write_radiographs(folder: Path) -> None:
    (folder / "png").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for patient in range(PATIENTS):
        own = rng.random((24, 30))
        for number, day in enumerate(DAYS):
            name = f"i{patient}-{number}"
            grey = np.clip(own + 0.02 * day, 0, 1)
            Image.fromarray((255 * grey).astype(np.uint8)).save(folder / "png" / f"{name}.png")
            crp = "" if patient == 0 and day == 5 else "-inf" if patient == 1 and day == 5 else str(10.0 + day)
            rows.append([f"p{patient}", name, "fm"[patient % 2], day, ("ap", "pa")[patient % 3 == 0], crp])
    with (folder / "data.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([COLUMNS, *rows])


def write_meshnet(folder: Path) -> None:
    """A network that calls what is brighter than .6 a ventricle, and what is brighter than .3 white matter."""
    folder.mkdir(parents=True)
    kernel, bias = np.zeros((3, 3, 3, 1, 1), "<f4"), np.zeros(1, "<f4")
    kernel[1, 1, 1] = 1
    weights = np.array([[[[[0.0, 1.0, 3.0]]]]], "<f4")
    offsets = np.array([0.0, -0.3, -1.5], "<f4")  # lines that cross at .3 and .6
    arrays = [kernel, bias, weights, offsets]
    layer = {"class_name": "Conv3D", "config": {"dilation_rate": [1, 1, 1]}}
    model = {
        "modelTopology": {"model_config": {"config": {"layers": [layer, {"config": {"name": "elu"}}, layer]}}},
        "weightsManifest": [{"weights": [{"shape": list(array.shape)} for array in arrays]}],
    }
    (folder / f"{MODEL}.json").write_text(json.dumps(model))
    (folder / f"{MODEL}.bin").write_bytes(b"".join(array.tobytes() for array in arrays))
    names = ["Unknown", "Cerebral-White-Matter", "Lateral-Ventricle", "Inferior-Lateral-Ventricle"]
    (folder / COLOURS).write_text(json.dumps({"labels": names}))


def head(ventricle: int) -> np.ndarray:
    """A block of brain of 60 x 70 x 40 voxels with a bright block inside, off the middle."""
    values = np.zeros((80, 90, 48), np.float32)
    values[10:70, 10:80, 4:44] = 0.45
    values[20 : 20 + ventricle, 30:60, 10:40] = 1.0
    return values


def write_brains(folder: Path) -> None:
    (folder / "patient07").mkdir(parents=True)
    (folder / "demographics.csv").write_text("patient_id,sex,days_between_studies\n7,F,203\n")
    for number, size in ((1, 10), (2, 14)):
        image = nibabel.Nifti1Image(head(size), np.diag([-2.0, -2.0, 3.0, 1.0]))
        nibabel.save(image, folder / "patient07" / f"study{number}_T1W.nii.gz")


@pytest.mark.slow
def test_a_segmentation_lies_in_the_grid_of_its_volume(benchmark: RealBenchmark) -> None:
    network = MeshNet(benchmark.data / WEIGHTS)
    for affine in (np.diag([2.0, 2.0, 2.0, 1.0]), np.diag([-2.0, -2.0, 2.0, 1.0])):
        segmented = network.segment(nibabel.Nifti1Image(head(14), affine))
        assert segmented.labels.shape == (80, 90, 48)
        wrong = segmented.mask("Lateral-Ventricle") != (head(14) > 0.9)
        assert wrong.mean() < 0.01
        assert segmented.volume_ml("Lateral-Ventricle") == pytest.approx(14 * 30 * 30 * 8 / 1000, rel=0.1)


def test_a_network_that_is_cut_off_is_named(benchmark: RealBenchmark, tmp_path: Path) -> None:
    write_meshnet(tmp_path / "weights")
    (tmp_path / "weights" / f"{MODEL}.bin").write_bytes(b"\0" * 8)
    with pytest.raises(ConfigError, match="does not fit"):
        MeshNet(tmp_path / "weights")
    with pytest.raises(ConfigError, match="cannot read the MeshNet"):
        MeshNet(tmp_path)


def test_one_radiograph_a_day_counts_and_one_without_crp_does_not(benchmark: RealBenchmark) -> None:
    folder = benchmark.data / RADIOGRAPHS
    visits = read_visits(folder, benchmark.radiographs, 16)
    assert len(visits) == PATIENTS * 3
    assert [visit.day for visit in visits[:3]] == [-2, 0, 5]
    with_crp = read_visits(folder, benchmark.with_crp, 16)
    assert len(with_crp) == PATIENTS * 3 - 2
    assert with_crp[0].attributes["crp"] == 8.0


@pytest.mark.slow
def test_every_rule_answers_every_follow_up_by_other_patients(benchmark: RealBenchmark) -> None:
    base = load_base(benchmark.config.base_model)
    visits = read_visits(benchmark.data / RADIOGRAPHS, benchmark.radiographs, base.resolution)
    rows = judge(base, benchmark.radiographs, visits)
    assert tuple(rows) == ROWS
    assert {len(found) for found in rows.values()} == {2 * PATIENTS}
    assert {row["gain_db"] for row in rows[COPY]} == {0.0}
    assert {row["days"] for row in rows[COPY]} == {2.0, 5.0}
    numbers = numbers_of(rows)
    # others' pictures are noise to a patient, so the best blend is nearly the scan
    assert numbers[BLEND]["gain_db"] > numbers["mean of other patients"]["gain_db"]
    assert over_db(rows, DRIFT, COPY)["gain_db"] == pytest.approx(numbers[DRIFT]["gain_db"])
    page = "\n".join(lines_of("Radiographs", "Text.", rows))
    assert f"20 follow-ups of {PATIENTS} patients, 2 to 5 days" in page
    assert "Over the best rule that knows no change" in page


@pytest.mark.slow
def test_the_page_is_written_and_without_data_nothing_is_run(benchmark: RealBenchmark, tmp_path: Path) -> None:
    files = run(benchmark, False, Console(quiet=True))
    assert [file.name for file in files] == ["real_scans.json", "real_scans.md"]
    numbers = json.loads(files[0].read_text())
    assert numbers["real_followups_tested"] == 2 * PATIENTS
    (brain,) = numbers["brains"]
    assert brain["meshnet_ventricles_ml"][1] / brain["meshnet_ventricles_ml"][0] == pytest.approx(1.4, rel=0.1)
    assert "doi 10.25835/0090041" in files[1].read_text()
    said = io.StringIO()
    absent = load_real_benchmark(CONFIG, [f"data={tmp_path / 'nowhere'}", f"output={tmp_path / 'out'}"])
    assert run(absent, False, Console(file=said)) == []
    assert "skipped" in said.getvalue()
