"""Bands and cohort curves of an evaluation, and the histories that it asks with."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ld_common.imaging.geometry import Frame
from ld_common.imaging.modality import Attributes, Modality
from ld_common.release.age_calibration import read_age_calibration
from ld_evaluate.calibration import HISTORY, ONE_SCAN, TimedErrors, bands_section, cohort_section, history_band
from ld_evaluate.dataset import read_data
from ld_evaluate.edits import EvaluationEdit, ScanPixels, TrueAnswer
from ld_evaluate.files import FOLLOW_UP
from ld_evaluate.protocol import PatientAnswer
from ld_evaluate.public import public_evaluation

FRAME = Frame(0.0, 1.0, (4, 4), (1.0, 1.0), 4.0, None)


def edit_of(patient: int, name: str, target: Attributes) -> EvaluationEdit:
    """An edit of a woman or man of 60 to 79 years, whose ventricles truly grow by 20 mm2 a year."""
    source: Attributes = {"age": 60.0 + patient % 20, "sex": "FM"[patient % 2], "diagnosis": "CN"}
    scanned = ScanPixels(
        np.zeros((4, 4), np.float32),
        FRAME,
        torch.zeros(1, 4, 4),
        {"ventricles": 500.0 + 20 * float(source["age"]) + patient % 7},
    )
    years = float(target.get("age", source["age"])) - float(source["age"])
    truth = TrueAnswer(None, torch.zeros(1, 4, 4), {"ventricles": 20.0 * years})
    return EvaluationEdit(f"SECRET-{patient}", patient, name, source, target, scanned, truth)


def edits_of(patients: int) -> list[EvaluationEdit]:
    edits = []
    for patient in range(patients):
        age = 60.0 + patient % 20
        edits.append(edit_of(patient, "age_plus_10", {"age": age + 10}))
        edits.append(edit_of(patient, "other_sex", {"sex": "MF"[patient % 2]}))
        edits.append(edit_of(patient, FOLLOW_UP, {"age": age + 2.0} | ({"diagnosis": "AD"} if patient < 3 else {})))
    return edits


def answer_to(edit: EvaluationEdit, error: float) -> PatientAnswer:
    assert edit.truth is not None
    true = edit.truth.growth_mm2
    drawn = {name: value + error for name, value in true.items()}
    return PatientAnswer("drift", edit.patient, edit.name, "", None, False, drawn, true)


def errors_of(modality: Modality, patients: int) -> TimedErrors:
    edits, rng = edits_of(patients), np.random.default_rng(0)
    return TimedErrors.of(modality, edits, [answer_to(edit, float(rng.normal(0, 50))) for edit in edits])


def test_only_edits_of_the_age_alone_calibrate_it(brain_mri: Modality) -> None:
    errors = errors_of(brain_mri, 24)
    assert set(errors.edits) == {"age_plus_10", FOLLOW_UP}
    assert errors.edits.count(FOLLOW_UP) == 21  # three were diagnosed in between
    assert sorted(set(errors.years)) == [2.0, 10.0]
    band = errors.band()
    assert band is not None
    assert band["truth"] == {"follow_ups": 21, "true_counterfactuals": 24}
    assert band["longest_years"] == 10
    assert errors_of(brain_mri, 19).band() is None
    assert history_band(errors_of(brain_mri, 19), [4.0] * 19) is None


def test_what_is_published_names_nobody_and_is_read_again(brain_mri: Modality) -> None:
    edits, errors = edits_of(42), errors_of(brain_mri, 42)
    history = history_band(errors, [0.5, 9.0, 2.0, 3.0, 4.0, 5.0, *[8.0] * 36])
    assert history is not None and history["least_spread_years2"] == 5.0  # the fifth
    run: dict[str, Any] = {"editor": "drift", "biomarkers": ["ventricles"], "by_edit": {}, "metrics": {}}
    run |= {"counts": {"patients": 42}, "cohort": cohort_section(brain_mri, edits)}
    run["bands"] = bands_section(brain_mri, {ONE_SCAN: errors.band(), HISTORY: history})
    public = json.loads(json.dumps(public_evaluation(run, edits)))
    assert "SECRET" not in json.dumps(public)
    assert public["bands"]["one_scan"]["patients"] == 40
    assert public["bands"]["one_scan"]["answers"] % 5 == 0
    assert public["bands"]["one_scan"]["truth"] == {"follow_ups": 40, "true_counterfactuals": 40}
    calibration = read_age_calibration(public)
    band, exact = calibration.one_scan, errors.band()
    assert band is not None and exact is not None
    assert band.factor == exact["factor"] and band.split
    curve = calibration.curve_of({"age": 66.0, "sex": "F", "diagnosis": "CN"})
    assert curve is not None and curve.at(70.0) == pytest.approx(1903, abs=15)
    assert calibration.curve_of({"age": 66.0, "sex": "F", "diagnosis": "AD"}) is None


def test_without_enough_patients_or_a_biomarker_nothing_is_said(brain_mri: Modality) -> None:
    assert cohort_section(brain_mri, edits_of(10)) == {}
    assert bands_section(brain_mri, {ONE_SCAN: None}) == {}
    run: dict[str, Any] = {"editor": "drift", "biomarkers": ["ventricles"], "by_edit": {}, "metrics": {}}
    public = public_evaluation(run | {"counts": {"patients": 3}, "bands": {}, "cohort": {}}, [])
    assert "bands" not in public and "cohort" not in public


def test_the_last_visit_is_asked_of_the_one_before_with_those_before_it(
    hospital: Path, brain_mri: Modality, tmp_path: Path
) -> None:
    with (hospital / "scans.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if not row["patient"].startswith("AH")]
    by_patient: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_patient.setdefault(row["patient"], []).append(row)
    several = next((visits for visits in by_patient.values() if len(visits) > 2), None)
    if several is None:  # a patient with a third visit, which is the second one again
        several = [*next(iter(by_patient.values()))[:2]]
        several.append(several[-1] | {"age": str(float(several[-1]["age"]) + 2)})
    with (tmp_path / "scans.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(several[0]))
        writer.writeheader()
        for row in several:
            writer.writerow(row | {"input": str((hospital / row["input"]).resolve())})
    data = read_data(tmp_path, brain_mri, 32).with_history
    assert data is not None
    (edit,), (history,) = data.edits, data.histories
    ages = [float(row["age"]) for row in several]
    assert edit.years == pytest.approx(ages[-1] - ages[-2])
    assert list(history.years) == pytest.approx([ages[-2] - age for age in ages[:-2]])
    assert history.write is not None and history.pictures.shape == (len(ages) - 2, 1, 32, 32)
    assert torch.equal(edit.scanned.picture, data.pictures[edit.scan])
