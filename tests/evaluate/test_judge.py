"""Measures of counterfactuals whose truth is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.editing.counterfactuals import edit_to
from ld_common.editing.registry import read_editor
from ld_common.imaging.modality import Modality
from ld_common.imaging.scan_table import read_scan_table
from ld_common.release.release import Release, find_release_base
from ld_evaluate.axioms import EditorRun, reversibility
from ld_evaluate.bootstrap import bootstrap_interval
from ld_evaluate.dataset import EvaluationData
from ld_evaluate.files import COPY
from ld_evaluate.judge import CounterfactualJudge
from ld_evaluate.patient_tables import Run
from ld_evaluate.report import release_page
from tests.evaluate.conftest import FEW

QUICK = {"num_inference_steps": 4}


def test_an_interval_is_over_patients_and_narrows_with_their_number() -> None:
    generator = np.random.default_rng(0)
    few, many = generator.normal(1.0, 1.0, 10), generator.normal(1.0, 1.0, 1000)
    widths = []
    for values in (few, many):
        interval = bootstrap_interval("gain", np.arange(len(values)), values)
        assert interval["gain_low"] < values.mean() < interval["gain_high"]
        widths.append(interval["gain_high"] - interval["gain_low"])
    assert widths[1] == pytest.approx(2 * 1.96 / 1000**0.5, rel=0.1)
    assert widths[0] > 3 * widths[1]
    # the same patients with more edits each
    repeated = bootstrap_interval("gain", np.repeat(np.arange(10), 50), np.repeat(few, 50))
    assert repeated["gain_high"] - repeated["gain_low"] == pytest.approx(widths[0])


@pytest.mark.slow
def test_an_exact_editor_composes_and_a_noisy_one_does_not(
    base: BaseModel, release: Release, judge: CounterfactualJudge
) -> None:
    options = {**QUICK, "noise_fraction": 1.0}
    metrics = {
        name: judge.judge(name, EditorRun(base, release, read_editor({"name": name, **options}))).metrics
        for name in ("belm", "sdedit")
    }
    assert abs(metrics["belm"]["null_edit_psnr_gap_db"]) < 0.01
    assert abs(metrics["belm"]["null_edits_psnr_gap_db"]) < 0.01
    assert metrics["sdedit"]["null_edit_psnr_gap_db"] > 0.05  # of an untrained VAE that loses most itself
    assert "frechet" not in metrics["belm"]


@pytest.mark.slow
def test_guidance_of_zero_is_the_copy_that_an_editor_must_beat(
    base: BaseModel, release: Release, judge: CounterfactualJudge
) -> None:
    editor = read_editor({"name": "belm", "guidance_scale": 0.0, **QUICK})
    judgement = judge.judge("belm", EditorRun(base, release, editor))
    assert judgement.metrics["change"] < 1e-3
    assert judgement.metrics["raw_gain_db"] == pytest.approx(0, abs=0.1)
    copied = judge.comparison.rules[COPY].by_edit
    for edit, numbers in judgement.compared.by_edit.items():
        assert numbers["ventricles_error_mm2"] == pytest.approx(copied[edit]["ventricles_error_mm2"], rel=0.1)
    assert {"age_plus_10", "follow_up"} <= set(copied)


@pytest.mark.slow
def test_the_mean_of_what_several_seeds_write_is_judged(
    base: BaseModel, release: Release, judge: CounterfactualJudge
) -> None:
    editor = read_editor({"name": "ddpm", "num_inference_steps": 2})  # exact: all seeds have one reconstruction
    answers = []
    for seeds in ([3], [4], [3, 4]):
        written = judge.judge("ddpm", EditorRun(base, release, editor, seeds)).written
        answers.append(np.concatenate([np.ravel(pixels) for pixels in written if pixels is not None]))
    first, second, both = answers
    assert np.abs(first - second).max() > 1
    assert np.abs(both - (first + second) / 2).mean() < 0.1 * np.abs(first - second).mean()


def test_all_scans_are_edited_back(base: BaseModel, release: Release, data: EvaluationData) -> None:
    editor_run = EditorRun(base, release, read_editor({"name": "belm", "guidance_scale": 0.0, **QUICK}))
    edits = [edit_to(data.modality, edit.scan, edit.source, edit.target) for edit in data.edits]
    drawn, _ = editor_run.draw(data.baselines.images, data.baselines.attributes, edits)
    spoilt = drawn.images.clone()
    spoilt[-1] = -spoilt[-1]  # of the last scan
    before, after = (
        reversibility(editor_run, data, replace(drawn, images=images))["reversal_psnr_db"]
        for images in (drawn.images, spoilt)
    )
    assert after < before - 0.05  # the untrained VAE hides most of it


def test_the_truth_is_the_best_answer_that_can_be_written(judge: CounterfactualJudge) -> None:
    data = judge.data
    truths = [edit.truth.pixels for edit in data.asked if edit.truth is not None]
    judgement = judge.judge_answers("truth", truths)
    assert judgement.metrics["raw_gain_db"] > 20
    assert judgement.metrics["followup_raw_gain_db"] > 20
    assert judgement.metrics["change"] == pytest.approx(judge.of_truth["change"])


@pytest.mark.slow
def test_reference_scans_give_predictors_a_distance_and_the_truths_own_score(
    base: BaseModel, release: Release, hospital: Path, data: EvaluationData, brain_mri: Modality
) -> None:
    reference = read_scan_table(hospital / "scans.csv", brain_mri, 32)
    judge = CounterfactualJudge(load_base(find_release_base(release)), data, reference, FEW)
    metrics = judge.judge("belm", EditorRun(base, release, read_editor({"name": "belm", **QUICK}))).metrics
    judged = {"frechet", "kernel", "age_moved", "latent_divergence"}
    assert judged <= set(metrics) and judged <= set(judge.of_truth)
    assert {"frechet", "kernel", "age_error"} <= set(judge.references)


def run_of(editor: str, real: dict[str, float], **metrics: float) -> Run:
    counts = {"patients": 24, "follow_ups": 0, "questions": 96, "reference_scans": 9, "reference_patients": 4}
    labels = {"modality": "brain", "biomarkers": [], "editor": editor, "seed": 0}
    return {**labels, "metrics": metrics, "by_edit": {}, "rules": {}, "of_truth": {}, "real": real, "counts": counts}


def test_predictors_that_do_no_better_than_chance_are_named() -> None:
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
    run = run_of("belm", real, frechet=2.0, age_moved=0.2, diagnosis_reached=0.7, sex_reached=0.1)
    text = release_page([run], "demo", Path("scans"))
    assert "diagnosis right in 54% (50% by chance)" in text
    assert warned(text) == ["diagnosis"]
    real["age_error"] = 7.9
    assert warned(release_page([run], "demo", Path("scans"))) == ["age", "diagnosis"]


def warned(page: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith("**")]
    return line.rpartition(": ")[2].rstrip(".*").split(", ")
