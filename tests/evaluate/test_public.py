"""What a release may publish of its evaluation: no single patient, no small group."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from ld_common.imaging.geometry import Frame
from ld_common.release.abilities import all_abilities
from ld_evaluate.edits import EvaluationEdit, ScanPixels
from ld_evaluate.public import public_evaluation


def asked(name: str, target: dict[str, Any]) -> EvaluationEdit:
    frame = Frame(0.0, 1.0, (4, 4), (1.0, 1.0), 4.0, None)
    scanned = ScanPixels(np.zeros((4, 4), np.float32), frame, torch.zeros(1, 4, 4), {})
    return EvaluationEdit("SECRET-1", 0, name, {"age": 70.0, "sex": "F"}, target, scanned)


def run(**cases: int) -> dict[str, Any]:
    numbers = {"gain_db": 3.14159, "gain_db_low": 2.0, "gain_db_high": 4.0, "ventricles_error_over_same": 1.2}
    return {
        "editor": "drift",
        "biomarkers": ["ventricles"],
        "by_edit": {name: {"cases": count, **numbers} for name, count in cases.items()},
        "metrics": {"sex_reached": 0.1234, "reversal_psnr_db": 30.0},
        "counts": {"patients": 23},
        "patients": [{"patient": "SECRET-1"}],
    }


def test_numbers_are_of_groups_and_counts_are_rounded() -> None:
    edits = [asked("age_plus_10", {"age": 80.0}), asked("other_sex", {"sex": "M"})]
    content = public_evaluation(run(age_plus_10=23, other_sex=4), edits)
    assert "SECRET" not in json.dumps(content)
    assert content["patients"] == 25
    assert list(content["edits"]) == ["age_plus_10"]
    entry = content["edits"]["age_plus_10"]
    assert (entry["attributes"], entry["cases"], entry["gain_db"]) == (["age"], 25, 3.142)
    assert entry["error_over_same"] == 1.2
    assert content["reached"] == {"sex": 0.123}
    assert any("age plus 10" in sentence for sentence in all_abilities(content))
