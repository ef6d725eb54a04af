"""What an audit may conclude: intervals, power, and a lower bound on ε that holds as often as it says."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.stats import binom

from ld_client.audit.one_run import audit_epsilon, chance_of_guesses, epsilon_bound
from ld_client.audit.statistics import AuditError, area_under_curve, operating_point, share


def test_shares_have_exact_intervals() -> None:
    assert (share(0, 20).low, share(20, 20).high) == (0.0, 1.0)
    assert share(0, 20).high == pytest.approx(1 - 0.025 ** (1 / 20))
    for true in (0.03, 0.5):  # over all outcomes, weighted by how likely they are
        covered = [share(count, 30).low <= true <= share(count, 30).high for count in range(31)]
        assert binom.pmf(np.arange(31), 30, true) @ np.array(covered) >= 0.95
    with pytest.raises(AuditError):
        share(3, 2)


def test_too_few_held_out_patients_are_said_not_interpolated() -> None:
    scores = np.arange(99.0)
    point = operating_point(scores.tolist(), scores.tolist(), 0.01)
    assert (point.true_positive_rate, point.chance, point.smallest_detectable) == (None, None, None)
    assert "needs 100 held-out patients, there are 99" in point.note
    assert operating_point(scores.tolist(), np.arange(100.0).tolist(), 0.01).true_positive_rate is not None


def test_a_rate_counts_members_above_the_allowed_held_out_patients() -> None:
    held_out = np.arange(200.0)
    point = operating_point([197.5, 198.5, 250.0, 3.0], held_out.tolist(), 0.01)
    assert point.false_positives == 2
    assert point.true_positive_rate == share(3, 4)
    everyone = operating_point((held_out + 500).tolist(), held_out.tolist(), 0.01)
    assert everyone.chance is not None and everyone.chance < 1e-50


@pytest.mark.slow
def test_rates_and_areas_leave_chance_out_as_seldom_as_they_say() -> None:
    rng = np.random.default_rng(0)
    rates, areas = 0, 0
    for _ in range(1000):
        members, held_out = rng.normal(size=60).tolist(), rng.normal(size=120).tolist()
        chance = operating_point(members, held_out, 0.01).chance
        area = area_under_curve(members, held_out)
        rates += chance is not None and chance <= 0.025
        areas += not area.low <= 0.5 <= area.high
    assert rates <= 40  # at most 2.5 %, and four standard deviations
    assert 25 <= areas <= 80


@pytest.mark.parametrize("shift", [0.7, 2.0])
def test_area_intervals_hold_the_true_area(shift: float) -> None:
    rng, held = np.random.default_rng(1), 0
    true = 0.5 * (1 + math.erf(shift / 2))
    for _ in range(500):
        area = area_under_curve((rng.normal(size=40) + shift).tolist(), rng.normal(size=30).tolist())
        held += area.low <= true <= area.high
    assert held >= 0.93 * 500
    perfect = area_under_curve([2.0, 3.0], [0.0, 1.0])
    assert perfect.value == perfect.high == 1.0
    assert perfect.low < 0.8  # two against two prove little


def test_the_smallest_detectable_leak_is_found_as_often_as_said() -> None:
    rng = np.random.default_rng(2)
    held_out = np.arange(300.0)
    smallest = operating_point([0.0] * 80, held_out.tolist(), 0.01).smallest_detectable
    assert smallest is not None
    found = 0
    for _ in range(500):
        members = np.where(rng.random(80) < smallest, 1000.0, -1.0)
        chance = operating_point(members.tolist(), held_out.tolist(), 0.01).chance
        found += chance is not None and chance <= 0.025
    assert 0.73 <= found / 500 <= 0.88
    area = area_under_curve(rng.normal(size=40).tolist(), rng.normal(size=40).tolist()).smallest_detectable
    assert area is not None
    shift = math.sqrt(2) * float(torch.special.ndtri(torch.tensor(area, dtype=torch.float64)))
    samples = [((rng.normal(size=40) + shift).tolist(), rng.normal(size=40).tolist()) for _ in range(500)]
    assert 0.7 <= sum(area_under_curve(*sample).low > 0.5 for sample in samples) / 500 <= 0.9
    assert area_under_curve([0.0, 1.0], [0.0, 1.0]).smallest_detectable is None


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(AuditError, match="not finite"):
        area_under_curve([0.0, math.nan], [0.0, 1.0])
    with pytest.raises(AuditError, match="1 held-out"):
        area_under_curve([0.0, 1.0], [0.0])


def test_the_ceiling_is_that_of_all_guesses_right() -> None:
    assert epsilon_bound(100, 100, 100) == pytest.approx(3.49, abs=0.005)
    assert epsilon_bound(1000, 1000, 1000) == pytest.approx(5.81, abs=0.005)
    coins = np.arange(100) % 2 == 0
    one = audit_epsilon(coins.astype(float).tolist(), coins.tolist(), guesses=[100])
    assert (one.correct, one.epsilon) == (100, one.ceiling)
    assert one.ceiling == pytest.approx(3.49, abs=0.005)
    two = audit_epsilon(coins.astype(float).tolist(), coins.tolist())
    assert two.guesses_tried == (100, 20)
    assert two.ceiling == pytest.approx(epsilon_bound(100, 100, 100, confidence=0.975))
    assert two.ceiling < one.ceiling


@pytest.mark.parametrize("guesses", [None, [200], [200, 100, 50, 20]])
def test_random_guesses_show_nothing(guesses: Sequence[int] | None) -> None:
    rng = np.random.default_rng(3)
    above = 0
    for _ in range(400):
        scores, coins = rng.normal(size=200), rng.random(200) < 0.5
        above += audit_epsilon(scores.tolist(), coins.tolist(), guesses=guesses).epsilon > 0
    assert above / 400 <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize("true", [0.5, 2.0, 4.0])
def test_randomised_response_is_bounded_from_below(true: float) -> None:
    rng, above = np.random.default_rng(4), 0
    for _ in range(400):
        coins, scores = randomised_response(rng, 200, true)
        above += audit_epsilon(scores.tolist(), coins.tolist()).epsilon > true
    assert above / 400 <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 400)
    coins, scores = randomised_response(rng, 20_000, true)
    many = audit_epsilon(scores.tolist(), coins.tolist(), guesses=[10_000])
    assert 0.85 * true <= many.epsilon <= true + 0.05


def randomised_response(rng: np.random.Generator, count: int, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Coins, and the answers of a mechanism that is ε-DP in each of them and no better."""
    coins = rng.random(count) < 0.5
    answers = coins ^ (rng.random(count) < 1 / (1 + math.exp(epsilon)))
    return coins, answers + 0.1 * rng.random(count)


@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_the_chance_of_guesses_covers_a_mechanism_that_uses_its_delta(delta: float) -> None:
    """Randomised response that with probability δ tells everything is (ε, δ)-DP."""
    canaries, epsilon = 60, 1.0
    accuracy = 1 / (1 + math.exp(-epsilon))
    for correct in range(1, canaries + 1):
        attained = (1 - delta) * binom.sf(correct - 1, canaries, accuracy) + delta
        assert chance_of_guesses(canaries, canaries, correct, epsilon, delta) >= min(attained, 1.0) - 1e-12


def test_a_larger_delta_shows_less() -> None:
    bounds = [epsilon_bound(1000, 600, 600, delta) for delta in (0.0, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] == pytest.approx(math.log(0.05 ** (1 / 600) / (1 - 0.05 ** (1 / 600))), abs=1e-6)
    assert epsilon_bound(1000, 600, 600, 1e-12) == pytest.approx(bounds[0], abs=1e-3)
    assert bounds[-1] < 0.9 * bounds[0]
    more = [epsilon_bound(1000, 600, correct, 1e-5) for correct in range(300, 601, 20)]
    assert more == sorted(more)
    assert more[0] == 0.0


def test_the_correction_for_delta_is_the_theorems() -> None:
    canaries, guesses, correct, epsilon, delta = 300, 90, 75, 1.1, 1e-4
    accuracy = 1 / (1 + math.exp(-epsilon))
    mass = [math.comb(guesses, k) * accuracy**k * (1 - accuracy) ** (guesses - k) for k in range(guesses + 1)]
    worst = max(sum(mass[max(0, correct - i) : correct]) / i for i in range(1, canaries + 1))
    expected = sum(mass[correct:]) + 2 * canaries * delta * worst
    assert chance_of_guesses(canaries, guesses, correct, epsilon, delta) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "coins", "options"),
    [
        ([1.0], [True, False], {}),
        ([1.0, math.inf], [True, False], {}),
        ([1.0, 2.0], [True, False], {"guesses": [3]}),
        ([1.0, 2.0], [True, False], {"guesses": []}),
        ([1.0, 2.0], [True, False], {"delta": 2.0}),
        ([1.0, 2.0], [True, False], {"confidence": 1.0}),
    ],
)
def test_impossible_audits_are_refused(scores: list[float], coins: list[bool], options: dict[str, object]) -> None:
    with pytest.raises(AuditError):
        audit_epsilon(scores, coins, **options)  # type: ignore[arg-type]
