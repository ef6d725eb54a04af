"""A cohort's curve is the least-squares curve of its patients, and a bend is taken only where there is one."""

from __future__ import annotations

import numpy as np
import pytest

from ld_common.core.errors import ReleaseError, RequestError
from ld_common.metrics.cohort import CohortCurve, fit_cohort

Rows = tuple[np.ndarray, np.ndarray, list[str], list[dict[str, str]]]


def cohort(count: int, bend: float = 0.0, faster: float = 0.0, seed: int = 0) -> Rows:
    """Two scans of each patient; the area is 800 + 20 a year after 70, and 300 more with the disease."""
    rng = np.random.default_rng(seed)
    ages = np.repeat(rng.uniform(55, 85, count), 2) + np.tile([0.0, 3.0], count)
    ill, sex = np.repeat(rng.random(count) < 0.5, 2), np.repeat(rng.choice(["F", "M"], count), 2)
    areas = 800 + (20 + faster * ill) * (ages - 70) + bend * (ages - 70) ** 2 + 300 * ill + 100 * (sex == "M")
    areas += np.repeat(rng.normal(0, 60, count), 2)
    categories = [{"sex": str(s), "diagnosis": "AD" if d else "CN"} for s, d in zip(sex, ill, strict=True)]
    return ages, areas, [f"p{row // 2}" for row in range(2 * count)], categories


def test_few_patients_share_a_slope_and_get_a_curve_for_each_combination() -> None:
    curves = fit_cohort(*cohort(48))
    assert [curve.categories for curve in curves] == [
        {"diagnosis": diagnosis, "sex": sex} for diagnosis in ("AD", "CN") for sex in ("F", "M")
    ]
    for curve in curves:
        ill, man = curve.categories["diagnosis"] == "AD", curve.categories["sex"] == "M"
        true = 800 + 20 * (np.array([60.0, 70.0, 80.0]) - 70) + 300 * ill + 100 * man
        assert curve.at([60.0, 70.0, 80.0]) == pytest.approx(true, abs=50)
        assert len(curve.coefficients) == 2
        assert curve.youngest % 5 == curve.oldest % 5 == 0
        assert np.isnan(curve.at([curve.youngest - 0.1, curve.oldest + 0.1])).all()


def test_a_bend_and_a_slope_of_its_own_are_found_where_they_are() -> None:
    assert {len(curve.coefficients) for curve in fit_cohort(*cohort(300))} == {2}
    assert {len(curve.coefficients) for curve in fit_cohort(*cohort(300, bend=2.0))} == {3}
    slopes = {c.categories["diagnosis"]: c.coefficients[1] / 10 for c in fit_cohort(*cohort(300, faster=15.0))}
    assert slopes["AD"] - slopes["CN"] == pytest.approx(15, abs=3)


def test_the_spread_holds_the_stated_share_of_other_patients() -> None:
    inside = []
    for seed in range(0, 20, 2):
        curves = {tuple(sorted(curve.categories.items())): curve for curve in fit_cohort(*cohort(200, seed=seed))}
        for age, area, _, names in zip(*cohort(200, seed=seed + 1), strict=True):
            curve = curves[tuple(sorted(names.items()))]
            if np.isfinite(curve.at(age)):
                inside.append(curve.low_mm2 <= area - curve.at(age) <= curve.high_mm2)
    assert np.mean(inside) == pytest.approx(0.9, abs=0.02)


def test_small_groups_get_no_curve_and_order_plays_no_part() -> None:
    ages, areas, patients, categories = cohort(40)
    categories[:8] = [{"sex": "F", "diagnosis": "MCI"}] * 8  # four patients
    curves = fit_cohort(ages, areas, patients, categories)
    assert "MCI" not in {curve.categories["diagnosis"] for curve in curves}
    order = np.random.default_rng(0).permutation(len(ages))
    shuffled = fit_cohort(
        ages[order], areas[order], [patients[row] for row in order], [categories[row] for row in order]
    )
    for one, other in zip(curves, shuffled, strict=True):
        assert one.coefficients == pytest.approx(other.coefficients, abs=0.01)
        assert (one.patients, one.youngest, one.oldest) == (other.patients, other.youngest, other.oldest)
    with pytest.raises(RequestError, match="20 patients, not 19"):
        fit_cohort(ages[:38], areas[:38], patients[:38], categories[:38])


def test_it_survives_json_and_refuses_other_content() -> None:
    curve = CohortCurve({"sex": "F"}, [800.0, 20.0], -100.0, 120.0, 0.9, 55.0, 85.0, 25)
    assert CohortCurve.from_state(curve.state()) == curve
    for name, value in (("coefficients", []), ("coefficients", ["x"]), ("low_mm2", float("inf")), ("categories", 3)):
        with pytest.raises(ReleaseError):
            CohortCurve.from_state(curve.state() | {name: value})
