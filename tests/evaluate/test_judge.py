"""Measures of counterfactuals whose truth is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.editing.registry import read_editor
from ld_common.imaging.modality import Modality
from ld_common.imaging.scan_table import read_scan_table
from ld_common.release.release import Release, find_release_base
from ld_evaluate.axioms import EditorRun
from ld_evaluate.bootstrap import bootstrap_interval
from ld_evaluate.dataset import EvaluationData
from ld_evaluate.judge import CounterfactualJudge
from ld_evaluate.report import Run, release_page
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


def test_an_exact_editor_composes_and_a_noisy_one_does_not(
    base: BaseModel, release: Release, judge: CounterfactualJudge
) -> None:
    options = {**QUICK, "noise_fraction": 1.0}
    metrics = {
        name: judge.judge(EditorRun(base, release, read_editor({"name": name, **options}))).metrics
        for name in ("belm", "sdedit")
    }
    assert abs(metrics["belm"]["null_edit_psnr_gap_db"]) < 0.01
    assert abs(metrics["belm"]["null_edits_psnr_gap_db"]) < 0.01
    assert metrics["sdedit"]["null_edit_psnr_gap_db"] > 0.05  # of an untrained VAE that loses most itself
    for values in metrics.values():
        copy, edited = values["copy_ventricles_error_mm2"], values["followup_ventricles_error_mm2"]
        assert values["followup_ventricles_error_cut"] == pytest.approx(1 - edited / copy)
    assert "frechet" not in metrics["belm"]


def test_guidance_of_zero_is_the_copy_that_an_editor_must_beat(
    base: BaseModel, release: Release, judge: CounterfactualJudge
) -> None:
    editor = read_editor({"name": "belm", "guidance_scale": 0.0, **QUICK})
    metrics = judge.judge(EditorRun(base, release, editor)).metrics
    assert metrics["change"] < 1e-4
    assert metrics["copy_gain_db"] == pytest.approx(0, abs=0.05)
    assert metrics["followup_psnr_db"] == pytest.approx(metrics["copy_psnr_db"], abs=0.05)
    assert metrics["followup_ventricles_error_cut"] == pytest.approx(0, abs=0.05)
    assert "growth_correlation" not in metrics or np.isfinite(metrics["growth_correlation"])


def test_the_mean_image_of_several_seeds_is_judged(
    base: BaseModel, release: Release, judge: CounterfactualJudge
) -> None:
    editor = read_editor({"name": "sdedit", "num_inference_steps": 2})
    first, second, both = (
        judge.judge(EditorRun(base, release, editor, seeds)).drawn.images for seeds in ([3], [4], [3, 4])
    )
    assert not torch.equal(first, second)
    assert torch.allclose(both, (first + second) / 2, atol=1e-6)


def test_reference_scans_give_predictors_and_a_distance(
    base: BaseModel, release: Release, hospital: Path, data: EvaluationData, brain_mri: Modality
) -> None:
    reference = read_scan_table(hospital / "scans.csv", brain_mri, 32)
    judge = CounterfactualJudge(load_base(find_release_base(release)), data, reference, FEW)
    metrics = judge.judge(EditorRun(base, release, read_editor({"name": "belm", **QUICK}))).metrics
    assert {"frechet", "kernel", "age_moved"} <= set(metrics)
    assert {"frechet", "kernel", "age_error"} <= set(judge.references)


def run_of(editor: str, real: dict[str, float], **metrics: float) -> Run:
    counts = {"patients": 24, "follow_ups": 0, "questions": 96, "reference_scans": 9, "reference_patients": 4}
    labels = {"modality": "brain", "editor": editor, "seed": 0}
    return {**labels, "metrics": metrics, "by_edit": {}, "real": real, "counts": counts}


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
