"""What an evaluation in a manifest says of a release, in sentences."""

from __future__ import annotations

from typing import Any

import pytest

from ld_common.metrics.bands import Band
from ld_common.release.abilities import abilities, all_abilities
from ld_common.release.age_calibration import read_age_calibration

EVALUATION: dict[str, Any] = {
    "editor": "drift",
    "patients": 25,
    "edits": {
        "age_plus_10": {
            "attributes": ["age"],
            "cases": 25,
            "gain_db": 6.94,
            "gain_db_low": 6.0,
            "gain_db_high": 7.5,
            "error_over_same": 1.31,
            "error_over_same_low": 1.1,
            "error_over_same_high": 1.5,
        },
        "other_sex": {"attributes": ["sex"], "cases": 25, "gain_db": -0.2, "gain_db_low": -0.5, "gain_db_high": 0.1},
        "follow_up": {
            "attributes": ["age", "diagnosis"],
            "cases": 20,
            "error_over_same": 0.6,
            "error_over_same_low": 0.4,
            "error_over_same_high": 0.8,
        },
    },
    "reached": {"sex": 0.12},
}


def test_each_attribute_is_said_what_it_is_worth() -> None:
    (age,) = abilities(EVALUATION, ["age"])
    assert "6.9 dB nearer" in age
    assert "1.31 times" in age
    assert "does not tell who changes faster" in age
    sex = abilities(EVALUATION, ["sex"])
    assert "no nearer to the truth" in sex[0]
    assert "12 %" in sex[1]
    both = abilities(EVALUATION, ["diagnosis", "age"])
    assert any("tells patients apart" in line for line in both)
    assert len(both) == 2
    assert abilities(EVALUATION, ["diagnosis"]) == []
    assert len(all_abilities(EVALUATION)) == 4


@pytest.mark.parametrize(
    "evaluation",
    [
        {},
        {"edits": 3, "reached": "all"},
        {"edits": {"age_plus_10": None}},
        {"edits": {"age_plus_10": {"attributes": "age", "gain_db": 3.0}}},
        {"edits": {"age_plus_10": {"attributes": ["age"], "gain_db": float("nan"), "error_over_same": "1"}}},
        {"reached": {"age": True}},
        {"raw_gain_db": 3.0},
    ],
)
def test_what_is_no_evaluation_says_nothing(evaluation: dict[str, Any]) -> None:
    assert abilities(evaluation, ["age", "sex"]) == []
    assert all_abilities(evaluation) == []


BANDS = {"biomarker": "ventricles", "one_scan": Band(30.0, 8.0, 2.0, 0.9, 25, 75, 20.0, False).state()}


def test_a_band_is_told_for_the_age_alone() -> None:
    evaluation = EVALUATION | {"bands": BANDS}
    *_, band = abilities(evaluation, ["age"])
    assert "from one scan (25 test patients)" in band
    assert "ventricles over 10 years was within 171 mm2" in band and "90 %" in band
    assert abilities(evaluation, ["sex"]) == abilities(EVALUATION, ["sex"])
    assert band in all_abilities({"bands": BANDS})


@pytest.mark.parametrize(
    "bands",
    [3, {"one_scan": 3}, {"one_scan": {}}, {"one_scan": BANDS["one_scan"] | {"factor": "x"}}],  # type: ignore[operator]
)
def test_what_is_no_band_says_nothing(bands: Any) -> None:
    assert all_abilities({"bands": bands, "cohort": [3]}) == []
    calibration = read_age_calibration({"bands": bands, "cohort": {"curves": [3, {}]}})
    assert calibration.one_scan is None and calibration.curves == []
