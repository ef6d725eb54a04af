"""Bands of drawn changes cover what they promise, whatever the law of the errors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ld_common.core.errors import ReleaseError, RequestError
from ld_common.metrics.bands import FEWEST_PATIENTS, Band, conformal_quantile, coverage, fit_band

Law = Callable[[np.random.Generator, np.ndarray], np.ndarray]
"""Draws errors of answers over these years."""
LAWS: dict[str, Law] = {
    "gaussian": lambda rng, years: rng.normal(0, np.hypot(20, 8 * years)),
    "heavy tails": lambda rng, years: rng.standard_t(2, years.shape) * np.hypot(30, 3 * years),
    "noise alone": lambda rng, years: rng.laplace(0, 50, years.shape),
    "years alone": lambda rng, years: rng.normal(0, 1, years.shape) * 10 * years,
    "biased": lambda rng, years: 12 * years + rng.normal(0, 30, years.shape),
    "not of this scale": lambda rng, years: rng.normal(0, 0.5 * years**2 + 5),
}


def answers(law: Law, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Errors, years and patients: one to four answers each, with a part of the error that a patient's answers share."""
    number = rng.integers(1, 5, count)
    rows = np.repeat(np.arange(count), number)
    years = np.where(rng.random(len(rows)) < 0.5, rng.uniform(1, 5, len(rows)), rng.choice([10.0, 20.0], len(rows)))
    return law(rng, years) * rng.gamma(4, 0.25, count)[rows], years, [f"p{row}" for row in rows]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("count", [24, 60])
def test_new_patients_are_covered_as_promised(law: str, count: int) -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(40):
        band = fit_band(*answers(LAWS[law], rng, count))
        shares.append(coverage(band, *answers(LAWS[law], rng, 300)))
    assert band.split == (count > 24)
    error = np.std(shares) / len(shares) ** 0.5
    assert np.mean(shares) > 0.9 - 3 * error - (0 if band.split else 0.005)
    assert np.mean(shares) < 0.9 + 1.5 / (count * 2 / 3) + 0.03


def test_the_scale_is_that_of_the_errors() -> None:
    rng = np.random.default_rng(1)
    for noise, per_year in ((40.0, 0.0), (40.0, 8.0), (10.0, 8.0)):
        years = rng.uniform(1, 20, 3000)
        band = fit_band(rng.laplace(0, np.hypot(noise, per_year * years)), years, [str(row) for row in range(3000)])
        for time in (1.0, 5.0, 10.0, 20.0):
            assert band.half_width(time) == pytest.approx(np.log(10) * np.hypot(noise, per_year * time), rel=0.12)


def test_it_widens_with_the_years_and_ignores_order_and_unit() -> None:
    rng = np.random.default_rng(2)
    errors, years, patients = answers(LAWS["gaussian"], rng, 40)
    band = fit_band(errors, years, patients)
    widths = band.half_width(np.linspace(0, 40, 200))
    assert (np.diff(widths) >= 0).all() and widths[0] > 0
    assert band.half_width(-10.0) == band.half_width(10.0)
    order = rng.permutation(len(errors))
    assert fit_band(errors[order], years[order], [patients[row] for row in order]) == band
    larger = fit_band(1000 * errors, years, patients)
    assert larger.half_width(10.0) == pytest.approx(1000 * band.half_width(10.0), rel=1e-2)
    assert fit_band(-errors, years, patients) == band


def test_with_one_answer_a_patient_it_is_split_conformal_prediction() -> None:
    scores = np.random.default_rng(3).random(25)
    assert conformal_quantile(scores, np.arange(25), 0.9) == np.sort(scores)[int(np.ceil(26 * 0.9)) - 1]
    assert conformal_quantile(scores[:19], np.arange(19), 0.95) == scores[:19].max()
    assert conformal_quantile(scores[:8], np.arange(8), 0.9) == np.inf
    # the same answers several times
    repeated = conformal_quantile(np.repeat(scores, 3), np.repeat(np.arange(25), 3), 0.9)
    assert repeated == conformal_quantile(scores, np.arange(25), 0.9)


def test_too_few_patients_get_none_however_many_answers() -> None:
    few = [f"p{row % (FEWEST_PATIENTS - 1)}" for row in range(500)]
    with pytest.raises(RequestError, match="20 patients with a known truth, not 19"):
        fit_band(np.ones(500), np.ones(500), few)
    with pytest.raises(RequestError, match="needs 99 patients"):
        fit_band(np.ones(50), np.ones(50), [str(row) for row in range(50)], level=0.99)
    with pytest.raises(RequestError, match="above 0"):
        fit_band(np.ones(50), np.zeros(50), [str(row) for row in range(50)])
    with pytest.raises(RequestError, match="numbers"):
        fit_band(np.full(50, np.nan), np.ones(50), [str(row) for row in range(50)])


def test_one_number_of_years_and_no_error_are_no_exception() -> None:
    patients = [str(row) for row in range(40)]
    errors = np.random.default_rng(4).normal(0, 10, 40)
    band = fit_band(errors, np.full(40, 3.0), patients)
    assert band.noise_mm2 > 0 and band.noise_mm2_per_year > 0  # nothing tells the two apart
    assert coverage(band, errors, np.full(40, 3.0), patients) >= 0.85
    assert fit_band(np.zeros(40), np.full(40, 3.0), patients).half_width(5.0) == 0


def test_years_that_few_were_judged_over_are_an_extrapolation() -> None:
    years = np.array([2.0] * 30 + [15.0] * 4 + [12.0])
    band = fit_band(np.ones(35), years, [str(row) for row in range(35)])
    assert band.longest_years == 12
    assert band.judged(12) and not band.judged(12.5) and not band.judged(-1)


def test_it_survives_json_and_refuses_other_content() -> None:
    band = Band(12.5, 3.25, 2.1, 0.9, 25, 75, 20.0, False)
    assert Band.from_state(band.state()) == band
    for name, value in (("factor", "x"), ("noise_mm2", float("nan")), ("level", 2), ("noise_mm2_per_year", -1.0)):
        with pytest.raises(ReleaseError):
            Band.from_state(band.state() | {name: value})
    with pytest.raises(ReleaseError):
        Band.from_state({})
