"""The arithmetic of privacy: noise that keeps a promise, refusals, what a release says of it."""

from __future__ import annotations

import itertools

import pytest

from ld_common.core.config import from_mapping
from ld_common.core.errors import ConfigError, PrivacyError
from ld_common.protocol.dp_accounting import Charge, DpConfig, epsilon, epsilon_rdp, noise_over_signal, plan
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import privacy_statement

ON = {"enabled": True, "patients": 400, "expected_batch_size": 32, "target_delta": 1 / 4000}
PRIVATE = {"privacy": ON, "federation": {"weighting": "equal", "rounds": 3}}


@pytest.mark.slow
def test_the_noise_of_a_plan_is_the_least_that_keeps_its_target() -> None:
    found = plan(DpConfig(**ON, target_epsilon=8.0), 3, 100, with_drift=False)
    assert found.step.steps == 300
    assert found.step.noise_multiplier == pytest.approx(0.99, abs=0.01)  # design/privacy.md, by Opacus itself
    assert 7.95 < found.epsilon <= 8.0
    less = Charge(found.step.noise_multiplier * 0.99, found.step.sampling_rate, found.step.steps)
    assert epsilon([less], 1 / 4000) > 8.0


@pytest.mark.slow
def test_a_drift_is_paid_for_out_of_the_same_target() -> None:
    privacy = DpConfig(**ON, target_epsilon=3.0, drift_noise_multiplier=4.0)
    without, paid = (plan(privacy, 1, 300, with_drift) for with_drift in (False, True))
    assert paid.step.noise_multiplier > without.step.noise_multiplier
    assert 2.9 < epsilon(paid.charges, privacy.target_delta) <= 3.0
    with pytest.raises(PrivacyError, match="drift_noise_multiplier"):
        plan(DpConfig(**ON, target_epsilon=0.1, drift_noise_multiplier=1.0), 1, 10, with_drift=True)


def test_charges_compose_in_any_order_and_only_grow() -> None:
    charges = [Charge(1.5, 0.1, 50), Charge(10.0, 1.0, 1), Charge(1.5, 0.1, 20)]
    totals = {epsilon(list(order), 1e-5) for order in itertools.permutations(charges)}
    assert len(totals) == 1
    running = [epsilon(charges[:count], 1e-5) for count in range(4)]
    assert running[0] == 0.0
    assert running == sorted(running)
    assert running[3] <= epsilon_rdp(charges, 1e-5)  # the looser bound


def test_one_gaussian_release_costs_what_theory_says() -> None:
    # analytic Gaussian mechanism (arXiv 1805.06530, Theorem 8) at noise multiplier 2, δ 1e-5: ε 1.9931
    assert 1.9931 <= epsilon([Charge(2.0, 1.0, 1)], 1e-5) < 1.9931 + 0.02


def test_noise_over_signal_is_the_design_notes_arithmetic() -> None:
    assert noise_over_signal(1.0, 200_000, 32) == pytest.approx(14.0, abs=0.1)
    assert noise_over_signal(1.0, 25_000, 512) == pytest.approx(0.31, abs=0.01)


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        ({"target_delta": 1 / 400}, "below 1/patients"),
        ({"expected_batch_size": 500}, "expected_batch_size is 500"),
        ({"target_epsilon": 0.0}, "target_epsilon is 0"),
        ({"target_epsilon": 1e6}, "target_epsilon"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1"),
        ({"ema": 1.0}, "ema is 1"),
        ({"augmentation_multiplicity": 0}, "augmentation_multiplicity is 0"),
        ({"drift_clip_norm": 30.0}, "drift_clip_norm is 30"),
    ],
)
def test_a_promise_that_cannot_be_kept_is_refused(privacy: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_mapping(StudyConfig, {**PRIVATE, "privacy": {**ON, **privacy}})


@pytest.mark.parametrize(
    "changed",
    [
        {"federation": {"weighting": "num_examples"}},
        {"drift": {"shape": "conditional"}},
        {"drift": {"shape": "scalar", "estimator": "grid"}},
    ],
)
def test_a_study_that_would_show_patients_beside_the_noise_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.enabled"):
        from_mapping(StudyConfig, {**PRIVATE, **changed})


@pytest.mark.slow
def test_a_release_states_its_privacy_and_none_that_it_has_not() -> None:
    said = privacy_statement(from_mapping(StudyConfig, PRIVATE))
    assert said["epsilon"] <= 8.0 < said["epsilon_by_renyi"]
    assert (said["steps"], said["sampling_rate"], said["delta"]) == (300, 0.08, 1 / 4000)
    assert privacy_statement(from_mapping(StudyConfig, {})) == {"differential_privacy": False}
