"""What a patient's answer is worth beside rules without a network, on edits whose numbers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ld_common.imaging.geometry import Frame
from ld_common.imaging.modality import Modality
from ld_evaluate.comparison import r_over_ceiling
from ld_evaluate.edits import EvaluationEdit, ScanPixels, TrueAnswer
from ld_evaluate.files import FOLLOW_UP, SAME
from ld_evaluate.minimality import divergence
from ld_evaluate.patient_tables import patient_sections
from ld_evaluate.protocol import PatientAnswer, gain_db, same_change, summarize

FRAME = Frame(0.0, 100.0, (8, 8), (1.0, 1.0), 8.0, None)
PIXELS = np.random.default_rng(0).uniform(0, 100, (8, 8)).astype(np.float32)
SCAN = ScanPixels(PIXELS, FRAME, torch.zeros(1, 8, 8), {"ventricles": 500.0})
AGE = "age_plus_10"


def asked(patient: int, growth: float, name: str = AGE, years: float = 1.0, sex: str = "") -> EvaluationEdit:
    truth = TrueAnswer(PIXELS + 10, torch.zeros(1, 8, 8), {"ventricles": growth})
    target = {"sex": sex} if sex else {"age": 80.0}
    return EvaluationEdit(f"P{patient}", patient, name, {"age": 70.0, "sex": "F"}, target, SCAN, truth, years)


def answered(growths: list[float], true: list[float], direction: str = "", first: int = 0) -> list[PatientAnswer]:
    return [
        PatientAnswer(
            "mine", f"P{first + row}", AGE, direction, 1.0, True, {"ventricles": drawn}, {"ventricles": value}
        )
        for row, (drawn, value) in enumerate(zip(growths, true, strict=True))
    ]


def test_the_same_change_for_all_is_that_of_the_others() -> None:
    growths = [10.0, 20.0, 60.0]
    predicted = [
        answer.growth_mm2["ventricles"] for answer in same_change([asked(*pair) for pair in enumerate(growths)])
    ]
    assert predicted == [40.0, 35.0, 15.0]
    assert not same_change([asked(0, 5.0)])  # no others


def test_a_follow_up_gets_the_others_yearly_change_times_its_years() -> None:
    edits = [asked(0, 10.0, FOLLOW_UP, 2.0), asked(1, 30.0, FOLLOW_UP, 3.0), asked(2, 50.0, FOLLOW_UP, 5.0)]
    first, second, third = (answer.growth_mm2["ventricles"] for answer in same_change(edits))
    assert (first, third) == (pytest.approx(2 * 80 / 8), pytest.approx(5 * 40 / 5))
    assert second == pytest.approx(3 * 60 / 7)


def test_patients_who_are_asked_for_opposite_categories_are_no_others_of_each_other() -> None:
    edits = [asked(0, 50.0, sex="M"), asked(1, -50.0, sex="F"), asked(2, 70.0, sex="M"), asked(3, -70.0, sex="F")]
    predicted = {answer.patient: answer.growth_mm2["ventricles"] for answer in same_change(edits)}
    assert predicted == {"P0": 70.0, "P1": -70.0, "P2": 50.0, "P3": -50.0}


def test_the_kind_of_edit_alone_has_no_correlation() -> None:
    """An answer that knows nothing of the patient, under two directions that differ by far."""
    rng = np.random.default_rng(0)
    up, down = rng.normal(100, 10, 200), rng.normal(-100, 10, 200)
    drawn_up, drawn_down = rng.normal(100, 10, 200), rng.normal(-100, 10, 200)
    answers = answered(list(drawn_up), list(up), "M") + answered(list(drawn_down), list(down), "F", 200)
    numbers = summarize(answers, [])[AGE]
    assert np.corrcoef(np.r_[drawn_up, drawn_down], np.r_[up, down])[0, 1] > 0.98  # pooled
    assert abs(numbers["ventricles_r"]) < 0.15
    assert numbers["ventricles_r_low"] < numbers["ventricles_r"] < numbers["ventricles_r_high"]


def test_errors_are_of_each_patient_and_over_those_of_the_rule() -> None:
    true = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    drawn = [value + (4 if row % 2 else -4) for row, value in enumerate(true)]
    same = same_change([asked(row, value) for row, value in enumerate(true)])
    numbers = summarize(answered(drawn, true), same)[AGE]
    assert numbers["ventricles_error_mm2"] == pytest.approx(4.0)
    rule = np.mean([answer.error_mm2("ventricles") for answer in same])
    assert numbers["ventricles_error_over_same"] == pytest.approx(4.0 / rule)
    assert numbers["ventricles_growth_ratio"] == pytest.approx(1.0)
    assert numbers["ventricles_r"] > 0.95
    assert summarize(same, same)[AGE]["ventricles_error_over_same"] == pytest.approx(1.0)
    assert "ventricles_r" not in summarize(same, same)[AGE]
    assert r_over_ceiling("ventricles", {AGE: {"ventricles_r": 0.6}, FOLLOW_UP: {}}, {AGE: 0.8}) == pytest.approx(0.75)


def test_growth_that_does_not_vary_has_no_r_and_counts_as_none() -> None:
    true = [10.0, 20.0, 30.0, 40.0, 50.0]
    numbers = summarize(answered([1e-4 * value for value in true], true), [])
    assert "ventricles_r" not in numbers[AGE]
    assert r_over_ceiling("ventricles", numbers, {AGE: 0.8}) == 0.0


def test_the_gain_is_in_the_pixels_of_the_file(brain_mri: Modality) -> None:
    edit = asked(0, 10.0)
    assert edit.truth is not None
    gains = [gain_db(brain_mri, edit, edit.truth, PIXELS + added) for added in (0.0, 5.0, 9.0, 20.0)]
    assert gains == pytest.approx([0.0, 20 * math.log10(2), 20.0, 0.0], abs=1e-3)


def test_the_page_names_the_worst_patient_first_and_the_ceiling() -> None:
    answers = answered([10.0, 99.0, 20.0], [10.0, 20.0, 30.0])
    run = {
        "editor": "mine",
        "modality": "brain",
        "biomarkers": ["ventricles"],
        "by_edit": summarize(answers, []),
        "rules": {SAME: {}},
        "patients": [answer.row() for answer in answers],
        "counts": {"follow_ups": 0, "raw_follow_ups": 0},
    }
    text = "\n".join(patient_sections([run], {AGE: 0.73}))
    assert "- mine: P1 79, P2 10, P0 0" in text
    assert "an r of 0.73 at most" in text


def test_latent_divergence_is_the_published_formula() -> None:
    to_target, to_source = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 5.0])
    assert divergence(2.0, to_target, to_source) == pytest.approx(math.log(0.8 * math.exp(0.5) + 0.2 * math.exp(0.5)))
    copied = divergence(0.0, to_target, to_source)
    assert copied == pytest.approx(math.log(0.8 + 0.2 * math.e))
    assert divergence(0.5, torch.tensor([1.0]), torch.tensor([0.1])) == 0.0 < copied  # beyond its own kind, not too far
    assert divergence(9.0, to_target, to_source) == pytest.approx(math.log(0.8 * math.e + 0.2))
