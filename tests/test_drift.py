from __future__ import annotations

import pytest
import torch

from ld_common.drift import drift_from_moments, mean_drift, shift_prior


def test_no_drift_is_the_very_same_noise() -> None:
    noise = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    assert shift_prior(noise, None, 0.07) is noise


def test_drift_shifts_the_prior_by_the_signal_level_and_keeps_the_dtype() -> None:
    noise = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    shifted = shift_prior(noise, torch.full((4, 1, 1), 2.0), 0.5)
    assert shifted.dtype == torch.bfloat16
    assert torch.allclose((shifted - noise).float(), torch.ones(2, 4, 8, 8), atol=0.02)


@pytest.mark.parametrize(("shape", "expected"), [("scalar", (1, 1, 1)), ("channel", (3, 1, 1)), ("map", (3, 4, 4))])
def test_drift_is_the_sites_mean_less_the_bases(shape: str, expected: tuple[int, ...]) -> None:
    base_mean = torch.tensor([0.1, -0.2, 0.3])
    latents = torch.randn(500, 3, 4, 4) * 0.1 + base_mean[:, None, None] + torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    drift = drift_from_moments(latents, base_mean, shape)
    assert drift is not None
    assert drift.shape == expected
    wanted = torch.tensor([2.0]) if shape == "scalar" else torch.tensor([1.0, 2.0, 3.0])
    assert torch.allclose(drift.mean((1, 2)), wanted, atol=0.01)


def test_without_a_mean_there_is_no_drift() -> None:
    assert drift_from_moments(torch.randn(3, 2, 4, 4), torch.zeros(2), "none") is None
    assert mean_drift([], []) is None


def test_mean_drift_weighs_the_sites() -> None:
    mean = mean_drift([torch.zeros(2, 1, 1), torch.ones(2, 1, 1)], [1.0, 3.0])
    assert mean is not None
    assert torch.allclose(mean, torch.full((2, 1, 1), 0.75))
