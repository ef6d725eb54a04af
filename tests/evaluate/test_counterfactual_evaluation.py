"""Judging counterfactuals: what is measured of answers whose truth is known, and the commands that say so."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.command import run_cli
from ld_common.core.config import from_mapping
from ld_common.core.errors import ConfigError, RequestError
from ld_common.diffusion.base_model import base_digest, load_base, load_denoiser
from ld_common.editing.base import Editor
from ld_common.editing.registry import EDITORS
from ld_common.imaging.modality import Modality
from ld_common.imaging.scan_table import read_scan_table
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import ReleaseContent, find_release_base, load_release_base, read_release, write_release
from ld_simulations.benchmarks.counterfactuals import execution
from ld_simulations.benchmarks.counterfactuals.cli import cli as fill_table
from ld_simulations.benchmarks.counterfactuals.data import EvaluationData, read_data
from ld_simulations.benchmarks.counterfactuals.execution import ReleaseWorker, Run
from ld_simulations.benchmarks.counterfactuals.judge import CounterfactualJudge, JudgeConfig, interval
from ld_simulations.benchmarks.counterfactuals.plan import load_counterfactuals
from ld_simulations.benchmarks.counterfactuals.table import page, release_page, summarize_table
from ld_simulations.benchmarks.latent_drift.cli import cli as evaluate
from ld_simulations.hospitals import HospitalConfig, HospitalsConfig, write_hospitals
from tests.conftest import random_state

FEW = JudgeConfig(cycles=2, cycled=1, predictor_steps=2)
COUNTS = {"patients": 24, "follow_ups": 24, "questions": 96, "reference_scans": 9, "reference_patients": 4}
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hospitals") / "one"
    return write_hospitals(
        HospitalsConfig(output=str(folder), hospitals=[HospitalConfig("aster", patients=4, held_out=2)])
    )


@pytest.fixture(scope="module")
def release(tiny_base: Path, brain_mri: Modality, tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = from_mapping(StudyConfig, {"base_model": str(tiny_base), "adapter": {"rank": 2}, "edit": {"steps": 4}})
    adapted = inject(load_denoiser(str(tiny_base)), read_adapter(study.adapter), study.seed)
    state = random_state(adapted.state(), 0.1)
    folder = tmp_path_factory.mktemp("release")
    return write_release(folder, study, brain_mri, ReleaseContent(base_digest(str(tiny_base)), state))


@pytest.fixture(scope="module")
def data(hospitals: Path, brain_mri: Modality) -> EvaluationData:
    return read_data(hospitals / "held_out", brain_mri, 32)


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


def test_rendered_patients_have_a_truth_for_each_edit_and_a_real_follow_up(data: EvaluationData) -> None:
    assert len(data.asked) == len(data.truths) > 0
    assert len(data.follow_ups.images) == len(data.owners) == len(data.baselines.images) == 2
    for owner, later in zip(data.owners, data.follow_ups.attributes, strict=True):
        assert float(later["age"]) > float(data.baselines.attributes[owner]["age"])
    moved = (data.follow_ups.images - data.baselines.images[data.owners]).abs().mean()
    assert 0 < float(moved) < 0.2


def test_scans_without_a_truth_are_asked_what_the_modality_has_words_for(brain_mri: Modality, tmp_path: Path) -> None:
    folder = write_scans(tmp_path, ("a", 70, "F", "CN"), ("b", 95, "M", "AD"), ("a", 73, "F", "CN"))
    found = read_data(folder, brain_mri, 32)
    assert (found.baselines.patients, found.follow_ups.patients, found.owners) == (["a", "b"], ["a"], [0])
    assert {(one.scan, one.name) for one in found.asked} == {
        (0, "age_plus_10"),
        (0, "age_plus_20"),
        (0, "sex_M"),
        (0, "diagnosis_AD"),
        (1, "sex_F"),
        (1, "diagnosis_CN"),
    }
    assert not found.truths


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("patient,input,age,sex\na,0.png,70,F\n", "row 1, lacks diagnosis"),
        ("patient,input,age,sex,diagnosis\na,0.png,7,F,CN\n", "age=7 is not a number within"),
        ("patient,input,age,sex,diagnosis\n", "has no row"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(brain_mri: Modality, tmp_path: Path, text: str, said: str) -> None:
    write_scans(tmp_path, ("a", 70, "F", "CN"))
    (tmp_path / "scans.csv").write_text(text)
    with pytest.raises(RequestError, match=said):
        read_data(tmp_path, brain_mri, 32)


def test_visits_in_another_order_are_no_follow_up(brain_mri: Modality, tmp_path: Path) -> None:
    folder = write_scans(tmp_path, ("a", 73, "F", "CN"), ("a", 70, "F", "CN"))
    with pytest.raises(RequestError, match="patient a are not in the order of the visits"):
        read_data(folder, brain_mri, 32)


def test_a_table_that_contradicts_its_scans_is_refused(hospitals: Path, brain_mri: Modality, tmp_path: Path) -> None:
    folder = shutil.copytree(hospitals / "held_out", tmp_path / "held_out")
    with (folder / "scans.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for wrong, said in (
        ([row | {"age": str(float(row["age"]) + 5)} for row in rows], "age is"),
        (rows[:2], "have 1 and 2 patients"),
        (rows[1::2], "have other first scans of patient"),  # follow-ups alone
    ):
        with (folder / "scans.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(wrong)
        with pytest.raises(RequestError, match=said):
            read_data(folder, brain_mri, 32)


def test_an_interval_is_over_patients_and_narrows_with_their_number() -> None:
    generator = np.random.default_rng(0)
    few, many = generator.normal(1.0, 1.0, 10), generator.normal(1.0, 1.0, 1000)
    widths = []
    for values in (few, many):
        found = interval("gain", np.arange(len(values)), values)
        assert found["gain_low"] < values.mean() < found["gain_high"]
        widths.append(found["gain_high"] - found["gain_low"])
    assert widths[1] == pytest.approx(2 * 1.96 / 1000**0.5, rel=0.1)
    assert widths[0] > 3 * widths[1]
    again = interval("gain", np.repeat(np.arange(10), 50), np.repeat(few, 50))  # the same patients, asked more often
    assert again["gain_high"] - again["gain_low"] == pytest.approx(widths[0])


def test_networks_that_do_no_better_than_chance_are_named() -> None:
    real = {
        "frechet": 1.0,
        "kernel": 0.1,
        "age_error": 5.0,
        "age_error_by_chance": 8.0,
        "diagnosis_right": 0.54,
        "diagnosis_right_by_chance": 0.5,
        "sex_right": 0.92,
        "sex_right_by_chance": 0.5,
    }
    runs = [run_of("near", 0, 4.0) | {"real": real}]
    runs[0]["metrics"] |= {"age_moved": 0.2, "diagnosis_reached": 0.7, "sex_reached": 0.1}
    text = release_page(runs, "demo", Path("scans"))
    assert "diagnosis right in 54% (50% by chance)" in text
    assert "No better than chance, so that nothing is read off: diagnosis.**" in text
    real["age_error"] = 7.9
    assert "nothing is read off: age, diagnosis.**" in release_page(runs, "demo", Path("scans"))


def test_an_exact_method_composes_and_a_noisy_one_does_not(release: Path, data: EvaluationData) -> None:
    loaded = read_release(release)
    base = load_release_base(loaded)
    judge = CounterfactualJudge(load_base(find_release_base(loaded)), data, None, FEW)
    found = {
        method: judge.judge(base, loaded, replace(loaded.study.edit, method=method, depth=1.0)).metrics
        for method in ("belm", "sdedit")
    }
    assert abs(found["belm"]["null_edit_psnr_gap_db"]) < 0.01
    assert abs(found["belm"]["null_edits_psnr_gap_db"]) < 0.01
    assert found["sdedit"]["null_edit_psnr_gap_db"] > 0.05  # of an untrained VAE that loses most itself
    for metrics in found.values():
        copy, own = metrics["copy_ventricles_error_mm2"], metrics["followup_ventricles_error_mm2"]
        assert metrics["followup_ventricles_error_cut"] == pytest.approx(1 - own / copy)
    assert "frechet" not in found["belm"]


def test_no_edit_at_all_is_the_copy_that_a_method_must_beat(release: Path, data: EvaluationData) -> None:
    loaded = read_release(release)
    judge = CounterfactualJudge(load_base(find_release_base(loaded)), data, None, FEW)
    metrics = judge.judge(load_release_base(loaded), loaded, Editor(method="belm", steps=4, strength=0.0)).metrics
    assert metrics["change"] < 1e-4
    assert metrics["copy_gain_db"] == pytest.approx(0, abs=0.05)
    assert metrics["followup_psnr_db"] == pytest.approx(metrics["copy_psnr_db"], abs=0.05)
    assert metrics["followup_ventricles_error_cut"] == pytest.approx(0, abs=0.05)
    assert "growth_correlation" not in metrics or np.isfinite(metrics["growth_correlation"])


def test_several_seeds_are_judged_by_their_mean(release: Path, data: EvaluationData) -> None:
    loaded = read_release(release)
    base, edit = load_release_base(loaded), Editor(method="sdedit", steps=4)
    judge = CounterfactualJudge(load_base(find_release_base(loaded)), data, None, FEW)
    first, second, both = (judge.judge(base, loaded, edit, seeds).drawn.images for seeds in ([3], [4], [3, 4]))
    assert not torch.equal(first, second)
    assert torch.allclose(both, (first + second) / 2, atol=1e-6)


def test_real_scans_give_predictors_and_a_distance(
    release: Path, hospitals: Path, data: EvaluationData, brain_mri: Modality
) -> None:
    loaded = read_release(release)
    reference = read_scan_table(hospitals / "scans.csv", brain_mri, 32)
    judge = CounterfactualJudge(load_base(find_release_base(loaded)), data, reference, FEW)
    metrics = judge.judge(load_release_base(loaded), loaded, Editor(method="belm", steps=4)).metrics
    assert {"frechet", "kernel", "age_moved"} <= set(metrics)
    assert {"frechet", "kernel", "age_error"} <= set(judge.references)


def test_a_release_is_judged_by_a_command(
    release: Path, hospitals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--release", str(release), "--data", str(hospitals / "held_out"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        run_cli(evaluate, [*asked, "--method", "belm", "--method", "sdedit", "--seeds", "2", "cycles=1", "cycled=1"])
    assert (ended.value.code or 0) == 0, capsys.readouterr()
    runs = json.loads((tmp_path / "out" / "counterfactuals.json").read_text())["runs"]
    assert [(run["method"], run["seed"]) for run in runs] == [("belm", 0), ("sdedit", 0), ("sdedit", 1)]
    text = (tmp_path / "out" / "counterfactuals.md").read_text()
    assert "| belm |" in text
    assert "A baseline edited to its follow-up" in text
    assert f"{runs[0]['counts']['questions']} questions about 2 patients" in text
    for run in runs:
        for key in ("copy_gain_db", "followup_ventricles_error_cut"):
            assert run["metrics"][f"{key}_low"] <= run["metrics"][key] <= run["metrics"][f"{key}_high"]
    for wrong, said in (
        (["--data", "x"], "--release with --data"),
        ([*asked, "--method", "belmm"], "belm"),
        ([*asked, "--reference", str(hospitals / "held_out" / "scans.csv")], "2 patients of --data are in --reference"),
    ):
        with pytest.raises(SystemExit) as ended:
            run_cli(evaluate, wrong)
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_the_table_is_filled_once_and_read_again(
    hospitals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = ["adapter.rank=1", "training.steps=1", "training.batch_size=2", "federation.rounds=1", "edit.steps=3"]
    config = {
        "output": str(tmp_path / "runs"),
        "results": str(tmp_path / "docs"),
        "demos": {"brain": str(CONFIGS / "demo.yaml")},
        "releases": {"prompt": quick, "instruct": [*quick, "adapter.name=instruct"]},
        "methods": {
            "belm": {"release": "prompt", "edit": {"method": "belm"}},
            "seen": {"release": "instruct", "edit": {"method": "instruct"}},
        },
        "judge": {"cycles": 1, "cycled": 1, "predictor_steps": 1},
        "hospitals": ["patients=1", "held_out=1"],
    }
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("ld_simulations.benchmarks.counterfactuals.execution.BATCH", 2)
    monkeypatch.setattr("ld_simulations.benchmarks.counterfactuals.execution.TURNS", 1)
    adopting = f"adopt={tmp_path / 'docs' / 'counterfactuals.json'}", f"output={tmp_path / 'elsewhere'}"
    for more in ((), (), adopting):
        with pytest.raises(SystemExit) as ended:
            run_cli(fill_table, ["--config", str(tmp_path / "table.yaml"), *more])
        assert (ended.value.code or 0) == 0, capsys.readouterr()
        monkeypatch.setattr(execution, "train_release", None)  # nothing is trained twice
    found = json.loads((tmp_path / "docs" / "counterfactuals.json").read_text())
    assert {run["method"] for run in found["runs"]} == {"belm", "seen"}
    (exact,) = [run for run in found["runs"] if run["method"] == "belm"]
    assert exact["metrics"]["null_edit_psnr_gap_db"] == pytest.approx(0, abs=0.01)
    assert [found["batch"][key] == found["summary"][key] for key in ("modality", "method")] == [True, True]
    assert found["summary"]["batch16_speedup"] == found["batch"]["speedup"] > 0
    assert "| seen |" in (tmp_path / "docs" / "counterfactuals.md").read_text()


def test_a_way_of_asking_may_be_kept_to_one_modality() -> None:
    table = CONFIGS / "benchmark_counterfactuals.yaml"
    benchmark = load_counterfactuals(table, ["seeds=[0]", "methods.pix2pix-zero.modalities=[chest]"])
    asked = {name: {one.training.modality for one in benchmark.askings if one.method == name} for name in EDITORS}
    assert asked == {name: {"brain", "chest"} for name in EDITORS} | {"pix2pix-zero": {"chest"}}
    assert set(benchmark.trainings) == {one.training for one in benchmark.askings}
    with pytest.raises(ConfigError, match="no demo 'knee': known: brain, chest"):
        load_counterfactuals(table, ["methods.belm.modalities=[knee]"])


def test_an_earlier_table_counts_as_done_except_of_what_is_asked_otherwise_now(tmp_path: Path) -> None:
    table, earlier = CONFIGS / "benchmark_counterfactuals.yaml", CONFIGS.parent / "docs/benchmarks/counterfactuals.json"
    options = [f"output={tmp_path / 'runs'}", f"adopt={earlier}"]
    written = json.loads(earlier.read_text())
    runs, batch = {f"{run['modality']}-{run['method']}-{run['seed']}": run for run in written["runs"]}, written["batch"]

    def found(*more: str) -> dict[str, Run]:
        benchmark = load_counterfactuals(table, [*options, *more])
        worker = ReleaseWorker(benchmark)
        return {asking.name: run for asking in benchmark.askings if (run := worker.found(asking)) is not None}

    assert found() == runs
    others = load_counterfactuals(table, [*options, "seeds=[1]"])
    asked = next(one for one in others.askings if one.method == batch["method"])
    assert ReleaseWorker(others).batch_speedup(asked) == batch  # whichever seed's release was timed
    for change in ("edit.strength=9", "seeds=2", "release=longer"):
        left = {name for name in runs if name.endswith("-0")} - found("seeds=[0]", f"methods.invert.{change}").keys()
        assert left == {"brain-invert-0", "chest-invert-0"}
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(RequestError, match="no table of counterfactuals"):
        ReleaseWorker(load_counterfactuals(table, [f"adopt={tmp_path / 'other.json'}"]))


def run_of(method: str, seed: int, gain: float) -> Run:
    metrics = {
        "null_edit_psnr_gap_db": 0.1,
        "followup_ventricles_error_cut": 0.1,
        "followup_ventricles_error_mm2": 90.0,
        "copy_ventricles_error_mm2": 100.0,
        "edit_direction_rate": 1.0,
        "copy_gain_db": gain,
        "growth_correlation": 0.9,
        **{f"{who}_{what}": 1.0 for who in ("copy", "followup") for what in ("psnr_db", "ssim", "ms_ssim")},
    }
    edits = {"age_plus_10": {"copy_gain_db": gain}}
    return {
        "modality": "brain",
        "method": method,
        "seed": seed,
        "metrics": metrics,
        "by_edit": edits,
        "real": {},
        "counts": COUNTS,
    }


def test_the_summary_is_of_the_method_that_comes_nearest_to_the_truth_and_says_what_it_missed() -> None:
    runs = [run_of("far", 0, 1.0), run_of("near", 0, 4.0), run_of("near", 1, 5.0), run_of("far", 1, 6.0)]
    speedup = {"speedup": 2.0, "batch": 16, "turns": [{"1": 2.0, "16": 1.0}], "threads": 1}
    summary = summarize_table(runs, {"brain": 0.95}, speedup)
    assert (summary["method"], summary["copy_gain_db"]) == ("near", 4.5)
    assert summary["growth_correlation_of_ceiling"] == pytest.approx(0.9 / 0.95)
    text = page(runs, 6, summary, {"brain": 0.95}, speedup)
    assert "4 of 6 planned results" in text
    assert "| `batch16_speedup` | 2 | at least 3 | **missed** |" in text
    assert "| `edit_direction_rate` | 1 | at least 0.98 | met |" in text
    assert "| near | 4.5 ± 0.71 |" in text
