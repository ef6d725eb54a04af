from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ld_common.models import load_base
from ld_common.objective import denoising_loss, training_noise, training_timesteps
from ld_common.sampling import denoise, epsilon_model, invert, sample, trajectory

SCHEDULER = DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
DATA_MEAN, DATA_VARIANCE = 1.5, 0.4


def gaussian_epsilon(latents: Tensor, timestep: int) -> Tensor:
    """The exact noise predictor for data from N(DATA_MEAN, DATA_VARIANCE): what a perfect network would say."""
    signal = float(SCHEDULER.alphas_cumprod[timestep])
    variance = signal * DATA_VARIANCE + 1 - signal
    return (1 - signal) ** 0.5 * (latents - signal**0.5 * DATA_MEAN) / variance


def test_without_drift_sampling_is_the_plain_ddim_scheduler() -> None:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = noise.clone()
    scheduler = DDIMScheduler.from_config(SCHEDULER.config)
    scheduler.set_timesteps(20)
    for timestep in scheduler.timesteps:
        plain = scheduler.step(gaussian_epsilon(plain, int(timestep)), int(timestep), plain).prev_sample
    ours = sample(gaussian_epsilon, trajectory(SCHEDULER, 20), noise)
    assert torch.allclose(ours, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [10, 25, 50])
def test_the_drift_recentres_samples_at_any_number_of_steps(steps: int) -> None:
    noise = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    path = trajectory(SCHEDULER, steps)
    without = sample(gaussian_epsilon, path, noise).mean()
    drifted = sample(gaussian_epsilon, path, noise, torch.full((1, 1, 1), DATA_MEAN)).mean()
    assert abs(float(drifted) - DATA_MEAN) < 0.02
    assert abs(float(without) - DATA_MEAN) > 0.03


@pytest.mark.parametrize("start", [0, 9, 24])
def test_refined_inversion_then_denoising_returns_the_image(start: int) -> None:
    latents = DATA_MEAN + torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    path = trajectory(SCHEDULER, 30)

    def error(refinements: int) -> float:
        noisy = invert(latents, gaussian_epsilon, path, start, refinements)
        return float((denoise(noisy, gaussian_epsilon, path, start) - latents).abs().max())

    assert error(6) < 1e-4
    assert error(6) < error(1) < error(0)


def test_the_trajectory_is_the_schedulers_own() -> None:
    path = trajectory(SCHEDULER, 50)
    assert path.timesteps[0] > path.timesteps[-1]
    assert path.levels == sorted(path.levels)
    assert path.signal_level == pytest.approx(float(SCHEDULER.alphas_cumprod[path.timesteps[0]]) ** 0.5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_gives_the_noise_that_was_added(kind: str) -> None:
    scheduler = DDIMScheduler.from_config(SCHEDULER.config, prediction_type=kind)
    clean, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    signal = scheduler.alphas_cumprod[300]
    noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
    answers = {
        "epsilon": noise,
        "v_prediction": signal.sqrt() * noise - (1 - signal).sqrt() * clean,
        "sample": clean,
    }

    class Perfect(torch.nn.Module):
        def forward(self, latents: Tensor, timestep: object, context: object) -> object:
            return type("Output", (), {"sample": answers[kind]})

    predicted = epsilon_model(Perfect(), scheduler, torch.zeros(1))(noisy, 300)  # type: ignore[arg-type]
    assert torch.allclose(predicted, noise, atol=1e-5)
    loss = denoising_loss(
        Perfect(), scheduler.alphas_cumprod, kind, clean, torch.zeros(1), torch.tensor([300, 300]), noise
    )
    assert float(loss) < 1e-10


def test_offset_noise_draws_nothing_when_it_is_off() -> None:
    first, second = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    plain = torch.randn((2, 3, 4, 4), generator=first)
    assert torch.equal(training_noise(torch.Size((2, 3, 4, 4)), 0.0, second), plain)
    assert torch.equal(first.get_state(), second.get_state())
    offset = training_noise(torch.Size((2000, 1, 8, 8)), 0.5, second)
    assert float(offset.mean((1, 2, 3)).std()) == pytest.approx((0.25 + 1 / 64) ** 0.5, rel=0.1)


def test_timesteps_lean_towards_noise_by_their_power() -> None:
    uniform, leaning = (
        training_timesteps(20000, 1000, power, torch.Generator().manual_seed(5)) for power in (1.0, 2.0)
    )
    for timesteps, median in ((uniform, 500), (leaning, 750)):
        assert int(timesteps.min()) >= 0
        assert int(timesteps.max()) <= 999
        assert float(timesteps.float().median()) == pytest.approx(median, abs=15)


def test_a_bases_channels_scale_and_size_are_read_from_the_model(tiny_base: Path) -> None:
    base = load_base(str(tiny_base))
    images = torch.rand(2, 1, base.side, base.side) * 2 - 1
    latents = base.encode(images)
    assert latents.shape == (2, *base.latent_shape)
    assert base.decode(latents).shape == images.shape
    assert float(base.decode(latents).abs().max()) <= 1
    unscaled = base.vae.encode(images).latent_dist.mean
    assert torch.allclose(latents, unscaled * base.vae.config["scaling_factor"])
