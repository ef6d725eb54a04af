from __future__ import annotations

import itertools

import pytest
import torch

from ld_common.core.errors import ConfigError
from ld_common.diffusion.drift import (
    FORMULATIONS,
    ConditionalDrift,
    LatentDrift,
    centre,
    drift_from_attributes,
    drift_from_moments,
    drift_from_shift,
    mean_drift,
    prior_shift,
    restore,
    shift_noise,
    shift_of,
    shift_output,
    step_shift,
)
from ld_common.diffusion.flow import flow_signal
from ld_common.diffusion.sampling import make_sampler, sample
from ld_simulations.benchmarks.bases.gaussian import NO_CONTEXT, SCHEDULER, gaussian_model, unit_noise

LEVELS = SCHEDULER.alphas_cumprod
MEAN = torch.tensor([2.0, -1.0])[:, None, None]


def test_no_drift_is_the_very_same_tensor_everywhere() -> None:
    latents = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    for answer in (
        centre(latents, None),
        restore(latents, None),
        shift_noise(latents, None, LEVELS),
        shift_output(latents, None, "epsilon", 0.5, LEVELS),
    ):
        assert answer is latents
    assert prior_shift(None, 0.07, LEVELS) is None
    assert step_shift(None, 50, LEVELS) is None


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_a_formulation_keeps_the_dtype(formulation: str) -> None:
    latents, drift = torch.randn(2, 2, 8, 8, dtype=torch.bfloat16), LatentDrift(MEAN, formulation)
    for answer in (
        centre(latents, drift),
        restore(latents, drift),
        shift_noise(latents, drift, LEVELS),
        shift_output(latents, drift, "v_prediction", 0.5, LEVELS),
    ):
        assert answer.dtype == torch.bfloat16


def test_each_formulation_enters_where_its_definition_says() -> None:
    latents, a = torch.zeros(1, 2, 4, 4), float(LEVELS[-1]) ** 0.5
    places = {}
    for name in FORMULATIONS:
        drift = LatentDrift(MEAN, name)
        places[name] = [
            centre(latents, drift)[0, 0, 0, 0].item(),
            shift_noise(latents, drift, LEVELS)[0, 0, 0, 0].item(),
            (prior_shift(drift, 0.1, LEVELS) if prior_shift(drift, 0.1, LEVELS) is not None else latents).max().item(),
            (step_shift(drift, 10, LEVELS) if step_shift(drift, 10, LEVELS) is not None else latents).max().item(),
            restore(latents, drift)[0, 0, 0, 0].item(),
        ]
    expected = {
        "prior": [0, 0, 0.2, 0, 0],
        "centred": [-2, 0, 0, 0, 2],
        "noise": [0, 2 * a, 2 * a, 0, 0],
        "per-step": [0, 2 * a, 0, 0.2 * a, 0],
        "per-step-literal": [0, 2 * a, 0, 2 * a, 0],
    }
    for name, values in expected.items():
        assert places[name] == pytest.approx(values), name


def test_a_shift_in_the_papers_units_comes_back() -> None:
    drift = LatentDrift(drift_from_shift(-0.1, LEVELS))
    assert float(shift_of(drift, LEVELS)) == pytest.approx(-0.1)
    assert float(drift.mean) == pytest.approx(-0.1 / 0.0683, rel=0.01)


def test_a_schedule_without_a_leak_has_no_shift_to_convert() -> None:
    with pytest.raises(ConfigError, match="zero SNR"):
        drift_from_shift(0.1, torch.tensor([0.9, 0.0]))


def test_an_unknown_formulation_is_named() -> None:
    with pytest.raises(ConfigError, match="per-step"):
        LatentDrift(MEAN, "per-stp")


@pytest.mark.parametrize("first", [0.999, 0.95, 0.9])
def test_rectified_flow_is_recentred_by_its_own_leak(first: float) -> None:
    """Euler steps along the exact velocity of N(mean, variance) data: only the shifted start lands on the mean."""
    mean, variance = 1.5, 0.4
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def end(start: torch.Tensor) -> float:
        z, times = start, torch.linspace(first, 0, 41, dtype=torch.float64)
        for time, following in itertools.pairwise(times):
            spread = (1 - time) ** 2 * variance + time**2
            centred = z - (1 - time) * mean
            velocity = (time - (1 - time) * variance) / spread * centred - mean
            z = z + (following - time) * velocity
        return float(z.mean())

    shift = prior_shift(LatentDrift(torch.tensor(mean)), flow_signal(first) ** 0.5, LEVELS)
    assert end(noise + shift) == pytest.approx(mean, abs=0.03)
    assert abs(end(noise) - mean) > abs(end(noise + shift) - mean)


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


def test_a_conditional_drift_finds_the_mean_of_each_condition() -> None:
    generator = torch.Generator().manual_seed(0)
    design = (torch.rand(400, 2, generator=generator) * 2 - 1).tolist()
    conditions = torch.tensor([[1.0, *row] for row in design])
    truth = torch.randn(3, 2, 4, 4, generator=generator)
    noise = 0.1 * torch.randn(400, 2, 4, 4, generator=generator)
    latents = torch.einsum("nk,kchw->nchw", conditions, truth) + noise
    base_mean = torch.tensor([0.5, -0.5])
    fitted = ConditionalDrift(drift_from_attributes(latents, base_mean, design))
    asked = [[0.3, -0.8], [0.0, 0.0]]
    expected = torch.einsum("nk,kchw->nchw", torch.tensor([[1.0, *row] for row in asked]), truth)
    assert torch.allclose(fitted.at(asked).mean, expected - base_mean[:, None, None], atol=0.05)
    # fewer scans than columns: the ridge still gives one finite answer, whose mean is the scans'
    few = drift_from_attributes(latents[:2], base_mean, design[:2])
    assert torch.isfinite(few).all()


def test_each_picture_starts_from_its_own_mean_whatever_the_batch() -> None:
    means = torch.linspace(0, 3, 6)[:, None, None, None]
    sampler = make_sampler(SCHEDULER, steps=5)
    context, noise = NO_CONTEXT.expand(6, -1, -1), unit_noise(6)
    whole, parts = (sample(gaussian_model(), context, noise, sampler, LatentDrift(means), size) for size in (6, 4))
    assert torch.equal(whole, parts)
    alone = sample(gaussian_model(), context[4:5], noise[4:5], sampler, LatentDrift(means[4]))
    assert torch.allclose(whole[4:5], alone)
