"""Differential privacy of a study: its options, its noise, and the ε of charges. Needs no data.

Unit: the patient, with all visits. Neighbouring data sets differ by the presence of one patient. Horizon: all rounds of
a study for `plan`, all charges in a site's ledger for `epsilon`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from scipy.optimize import brentq

from ld_common.core.config import require
from ld_common.core.errors import PrivacyError
from ld_common.diffusion.options import LARGEST_DRIFT

MAX_EPSILON = 100.0
LEAST_NOISE, MOST_NOISE = 0.2, 1000.0
"""Range of noise multipliers that is searched for a study's."""
NOISE_TOLERANCE, BRACKET_TOLERANCE = 1e-3, 0.05
SMALLEST = 1e-9
"""Replaces an ε of 0 in a logarithm."""


@dataclass
class DpConfig:
    """DP-SGD by patient (arXiv 1607.00133) at every site. All constants are public; none is counted from data."""

    RENAMED: ClassVar[dict[str, str]] = {
        "delta": "target_delta",
        "batch_patients": "expected_batch_size",
        "draws": "augmentation_multiplicity",
        "clip_norm": "max_grad_norm",
    }

    enabled: bool = False
    """Train with differential privacy."""
    target_epsilon: float = 8.0
    """ε of the whole study for one patient at one site."""
    target_delta: float = 1e-5
    """δ of the whole study; must lie below 1 / patients."""
    patients: int = 1000
    """Nominal number of patients of a site: the sampling rate is expected_batch_size / patients whatever their actual
    number."""
    expected_batch_size: int = 64
    """Expected number of patients in a step."""
    augmentation_multiplicity: int = 4
    """Number of (visit, timestep, noise) draws in one patient's gradient (arXiv 2210.09929)."""
    max_grad_norm: float = 0.01
    """L2 norm to which one patient's gradient is clipped. Noise is proportional to it: choose the median norm on public
    data."""
    drift_noise_multiplier: float = 10.0
    """Standard deviation of the noise on a site's drift, relative to the largest change that one patient can cause."""
    drift_clip_norm: float = 4.0
    """L2 norm to which one patient's mean latent, minus the base's mean, is clipped in a site's drift."""
    ema: float = 0.0
    """Decay of the exponential average of a round's noised weights, which is sent in their place; 0 sends the last
    weights."""

    def __post_init__(self) -> None:
        for name in ("max_grad_norm", "drift_noise_multiplier", "drift_clip_norm"):
            require(getattr(self, name) > 0, f"privacy.{name} is {getattr(self, name)}: it must be above 0")
        fits = self.drift_clip_norm <= LARGEST_DRIFT
        require(
            fits, f"privacy.drift_clip_norm is {self.drift_clip_norm}: use at most {LARGEST_DRIFT:g}, the largest drift"
        )
        for name in ("patients", "expected_batch_size", "augmentation_multiplicity"):
            require(getattr(self, name) >= 1, f"privacy.{name} is {getattr(self, name)}: use 1 or more")
        fits = 0 < self.target_epsilon <= MAX_EPSILON
        require(fits, f"privacy.target_epsilon is {self.target_epsilon}: use above 0, at most {MAX_EPSILON:g}")
        require(0 <= self.ema < 1, f"privacy.ema is {self.ema}: it must lie in [0, 1)")
        if self.enabled:
            fits = 0 < self.target_delta < 1 / self.patients
            require(
                fits,
                f"privacy.target_delta is {self.target_delta}: use above 0, below 1/patients = {1 / self.patients:.2g}",
            )
            fits = self.expected_batch_size <= self.patients
            require(
                fits, f"privacy.expected_batch_size is {self.expected_batch_size}, of {self.patients} privacy.patients"
            )

    @property
    def sampling_rate(self) -> float:
        """Probability of a patient to be in a step."""
        return self.expected_batch_size / self.patients


@dataclass(frozen=True)
class Charge:
    """`steps` times the Gaussian mechanism on a Poisson sample of a site's patients."""

    noise_multiplier: float
    """Standard deviation of the noise over the sensitivity to one patient."""
    sampling_rate: float
    steps: int


@dataclass(frozen=True)
class PrivacyPlan:
    """The noise of a study, computed once for all its rounds."""

    step: Charge
    """All training steps of the study."""
    drift: Charge | None
    """The site's drift, released once."""
    epsilon: float
    """ε of the whole study at the study's δ, by the PRV accountant; at most the target."""

    @property
    def charges(self) -> list[Charge]:
        """All charges of the study."""
        return [self.step, *([self.drift] if self.drift else [])]


def plan(privacy: DpConfig, rounds: int, steps: int, with_drift: bool) -> PrivacyPlan:
    """The least noise with which `rounds` of `steps` (and a drift) stay within the target; takes seconds, once.

    Raises:
        PrivacyError: the drift alone costs more than the target.
    """
    drift = privacy.drift_noise_multiplier if with_drift else None
    return _plan(privacy.target_epsilon, privacy.target_delta, privacy.sampling_rate, rounds * steps, drift)


@functools.lru_cache(maxsize=64)
def _plan(target: float, delta: float, rate: float, steps: int, drift_noise: float | None) -> PrivacyPlan:
    drift = None if drift_noise is None else Charge(drift_noise, 1.0, 1)
    others = [] if drift is None else [drift]

    def cost(noise: float) -> float:
        return epsilon([Charge(noise, rate, steps), *others], delta)

    def looser_cost(noise: float) -> float:
        return epsilon_rdp([Charge(noise, rate, steps), *others], delta)

    if looser_cost(MOST_NOISE) > target and cost(MOST_NOISE) > target:
        raise PrivacyError(
            f"no noise keeps the study within ε {target:g}: raise privacy.target_epsilon or "
            "privacy.drift_noise_multiplier, or set drift.shape to none"
        )
    # the looser bound is several times faster, and brackets the tight one
    high = _least(looser_cost, target, LEAST_NOISE, MOST_NOISE, BRACKET_TOLERANCE)
    low = high / 2
    while low > LEAST_NOISE and cost(low) <= target:
        high, low = low, low / 2
    noise = _least(cost, target, max(low, LEAST_NOISE), high)
    return PrivacyPlan(Charge(noise, rate, steps), drift, cost(noise))


def _least(
    cost: Callable[[float], float], target: float, low: float, high: float, tolerance: float = NOISE_TOLERANCE
) -> float:
    """The least noise whose cost is at most the target, up to a relative `tolerance`; cost falls with noise."""
    if cost(low) <= target:
        return low
    if cost(high) > target:
        return high

    def over(log_noise: float) -> float:  # nearly linear, so few steps find its zero
        return math.log(max(cost(math.exp(log_noise)), SMALLEST) / target)

    noise = math.exp(brentq(over, math.log(low), math.log(high), xtol=tolerance / 2))
    while cost(noise) > target:
        noise *= 1 + tolerance / 2
    return noise


def epsilon(charges: Sequence[Charge], delta: float) -> float:
    """ε at δ of all charges together, an upper bound by numerical composition (PRV, arXiv 2106.02848)."""
    return _composed("prv", _history(charges), delta)


def epsilon_rdp(charges: Sequence[Charge], delta: float) -> float:
    """The same by Rényi differential privacy (arXiv 1702.07476), a looser bound and an independent check."""
    return _composed("rdp", _history(charges), delta)


def _history(charges: Sequence[Charge]) -> tuple[tuple[float, float, int], ...]:
    """Charges as Opacus counts them: (noise multiplier, sampling rate, steps), equal mechanisms as one."""
    merged: dict[tuple[float, float], int] = {}
    for charge in charges:
        key = charge.noise_multiplier, charge.sampling_rate
        merged[key] = merged.get(key, 0) + charge.steps
    return tuple((noise, rate, steps) for (noise, rate), steps in sorted(merged.items()) if steps)


@functools.lru_cache(maxsize=4096)
def _composed(mechanism: str, history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """ε of a history, cached: a plan, a ledger and a report ask for the same ones, and each takes up to a second."""
    from opacus.accountants import create_accountant

    if not history:
        return 0.0
    accountant = create_accountant(mechanism)
    accountant.history = list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # division by zero in a tail, a wide range of orders: neither lowers the bound
        total = float(accountant.get_epsilon(delta=delta))
    if math.isnan(total):
        raise PrivacyError(f"ε of {len(history)} mechanisms at δ {delta:g} cannot be computed")
    return total


def noise_over_signal(noise_multiplier: float, parameters: int, expected_batch_size: int) -> float:
    """Norm of one step's noise over the largest norm of its mean clipped gradient; above 1 little is learned.

    noise_multiplier * sqrt(parameters) / expected_batch_size; the clip norm cancels.
    """
    return noise_multiplier * parameters**0.5 / expected_batch_size
