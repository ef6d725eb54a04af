"""A lower bound on ε from one training run with canaries in or out (Steinke, Nasr, Jagielski, arXiv 2305.08846).

Each of m canary patients takes part by an independent fair coin. If training is (ε, δ)-DP for adding or removing one
patient, its result allows only so many right guesses of the coins; more right guesses refute it. The bound holds for
the audited run and one patient; another attack may give a larger one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, expit
from scipy.stats import binom

from ld_client.audit.statistics import AuditError

GUESSED_SHARES = (1.0, 0.2)
"""Default shares of the canaries to guess: all, and the surest fifth."""
LARGEST_EPSILON = 100.0
HALVINGS = 40


@dataclass(frozen=True)
class EpsilonBound:
    """An empirical lower bound on ε; unit: one patient (added or removed); horizon: the audited training run."""

    epsilon: float
    """Training is not (ε', δ)-DP for any ε' below this, at `confidence`; 0 for no bound."""
    ceiling: float
    """The bound if every guess were right: the largest ε that the test can show."""
    delta: float
    confidence: float
    """Of the bound; each number of guesses was tested at 1 - (1 - confidence) / (numbers tried)."""
    canaries: int
    guesses: int
    """Number of guesses in the test that gave the bound."""
    correct: int
    guesses_tried: tuple[int, ...]


def audit_epsilon(
    scores: Sequence[float],
    included: Sequence[bool],
    delta: float = 0.0,
    confidence: float = 0.95,
    guesses: Sequence[int] | None = None,
) -> EpsilonBound:
    """Guess that the highest scores took part and the lowest did not, and bound ε by the right guesses.

    Args:
        scores: one a canary, higher for likelier participation; computed without the coins.
        included: the coins, independent and fair.
        delta: of the (ε, δ) that is tested.
        confidence: of the bound.
        guesses: numbers of guesses to try, chosen independently of the scores; the result is the best bound, with
            the confidence corrected for the choice (Bonferroni). `GUESSED_SHARES` of the canaries by default.

    Raises:
        AuditError: lengths differ, a score is not finite, or a number is out of range.
    """
    values, coins = np.asarray(scores, dtype=np.float64), np.asarray(included, dtype=bool)
    count = len(values)
    if count < 1 or coins.shape != values.shape:
        raise AuditError(f"there are {count} scores for {len(coins)} canaries: give one for each, and at least one")
    if not np.isfinite(values).all():
        raise AuditError("a canary's score is not finite: the model or its latents hold NaN or infinity")
    tried = _numbers_of_guesses(count, guesses)
    each = 1 - (1 - confidence) / len(tried)
    trials = [(number, _count_correct(values, coins, number)) for number in tried]
    bounds = [epsilon_bound(count, number, correct, delta, each) for number, correct in trials]
    best = int(np.argmax(bounds))
    ceiling = max(epsilon_bound(count, number, number, delta, each) for number in tried)
    return EpsilonBound(bounds[best], ceiling, delta, confidence, count, *trials[best], guesses_tried=tried)


def epsilon_bound(canaries: int, guesses: int, correct: int, delta: float = 0.0, confidence: float = 0.95) -> float:
    """The largest ε that `correct` right guesses refute; 0 for none.

    It is not corrected for a choice among several numbers of guesses, as in `audit_epsilon`.

    Raises:
        AuditError: a number is out of range.
    """
    if not 0 < confidence < 1:
        raise AuditError(f"the confidence is {confidence:g}: use a value between 0 and 1, as 0.95")
    refuted, held = 0.0, LARGEST_EPSILON
    if chance_of_guesses(canaries, guesses, correct, 0.0, delta) >= 1 - confidence:
        return 0.0
    for _ in range(HALVINGS):
        middle = (refuted + held) / 2
        if chance_of_guesses(canaries, guesses, correct, middle, delta) < 1 - confidence:
            refuted = middle
        else:
            held = middle
    return refuted


def chance_of_guesses(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Upper bound of P(at least `correct` right guesses) under (ε, δ)-DP (arXiv 2305.08846, Theorem 5.2).

    With W ~ Binomial(r, e^ε / (1 + e^ε)): P[W >= v] + 2 m δ max_i P[v > W >= v - i] / i.

    Raises:
        AuditError: not 0 <= correct <= guesses <= canaries, ε below 0, or δ outside [0, 1].
    """
    if not 0 <= correct <= guesses <= canaries:
        raise AuditError(
            f"{correct} right of {guesses} guesses about {canaries} canaries is impossible: check the counts"
        )
    if epsilon < 0 or not 0 <= delta <= 1:
        raise AuditError(
            f"epsilon {epsilon:g} and delta {delta:g} bound nothing: use epsilon >= 0 and delta from 0 to 1"
        )
    accuracy = expit(epsilon)
    chance = float(betainc(correct, guesses - correct + 1, accuracy)) if correct else 1.0  # P[W >= correct]
    if delta > 0 and correct > 0:
        just_below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, accuracy))
        chance += 2 * canaries * delta * float((just_below / np.arange(1, correct + 1)).max())
    return min(chance, 1.0)


def _numbers_of_guesses(count: int, guesses: Sequence[int] | None) -> tuple[int, ...]:
    if guesses is None:
        guesses = [max(1, round(part * count)) for part in GUESSED_SHARES]
    tried = tuple(sorted(set(guesses), reverse=True))
    if not tried or not 0 < tried[-1] <= tried[0] <= count:
        raise AuditError(f"guesses is {list(guesses)}: use numbers from 1 to {count}, the number of canaries")
    return tried


def _count_correct(scores: NDArray[np.float64], included: NDArray[np.bool_], guesses: int) -> int:
    """Right guesses: "in" for the highest scores, "out" for the lowest, half each; ties are broken by position."""
    order = np.argsort(-scores, kind="stable")
    guessed_in = guesses - guesses // 2
    guessed_out = order[len(order) - guesses // 2 :]
    return int(included[order[:guessed_in]].sum() + (~included[guessed_out]).sum())
