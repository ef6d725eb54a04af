from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from ld_common.diffusion.base_model import Denoiser, load_base
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.drift import LatentDrift, step_shift
from ld_common.diffusion.loss import (
    denoising_loss,
    denoising_pair,
    min_snr_weights,
    training_noise,
    training_timesteps,
    weighted_loss,
)
from ld_common.diffusion.schedule import ddim_denoise, ddim_invert, ddim_schedule, predictor
from ld_simulations.benchmarks.bases.gaussian import DATA_MEAN, NO_CONTEXT, SCHEDULER, gaussian_model, unit_noise
from ld_simulations.tiny_base.networks import make_scheduler


@pytest.mark.parametrize("start", [0, 9, 24])
def test_refined_inversion_then_denoising_returns_the_image(start: int) -> None:
    latents, schedule = DATA_MEAN + unit_noise(3, seed=2), ddim_schedule(SCHEDULER, 30)
    predict = predictor(gaussian_model(), Condition(NO_CONTEXT))

    def error(refinements: int) -> float:
        noisy = ddim_invert(latents, predict, schedule, start, refinements)
        return float((ddim_denoise(noisy, predict, schedule, start) - latents).abs().max())

    assert error(6) < 1e-4
    assert error(6) < error(1) < error(0)


@pytest.mark.parametrize("formulation", ["noise", "per-step", "per-step-literal"])
def test_inversion_under_a_drift_is_the_inverse_of_denoising_under_it(formulation: str) -> None:
    drift = LatentDrift(torch.full((1, 1, 1), 0.5), formulation)
    latents, schedule = DATA_MEAN + unit_noise(3, seed=2), ddim_schedule(SCHEDULER, 30)
    predict = predictor(gaussian_model(), Condition(NO_CONTEXT), drift)
    shift = step_shift(drift, 30, SCHEDULER.alphas_cumprod)
    noisy = ddim_invert(latents, predict, schedule, 0, 8, shift)
    assert torch.allclose(ddim_denoise(noisy, predict, schedule, 0, shift), latents, atol=1e-4)


def test_denoising_is_the_plain_ddim_scheduler() -> None:
    noise, scheduler = unit_noise(5), DDIMScheduler.from_config(SCHEDULER.config)
    plain, model = noise.clone(), gaussian_model()
    scheduler.set_timesteps(20)
    for timestep in scheduler.timesteps:
        plain = scheduler.step(model.unet(plain, timestep).sample, int(timestep), plain).prev_sample
    ours = ddim_denoise(noise, predictor(model, Condition(NO_CONTEXT)), ddim_schedule(SCHEDULER, 20))
    assert torch.allclose(ours, plain, rtol=0, atol=1e-6)


def test_a_schedule_that_ends_without_signal_stays_finite_both_ways() -> None:
    scheduler = make_scheduler(zero_terminal_snr=True)
    schedule, predict = ddim_schedule(scheduler, 20), predictor(gaussian_model(scheduler), Condition(NO_CONTEXT))
    assert schedule.alphas_cumprod[0] == 0
    latents = DATA_MEAN + unit_noise(4)
    assert torch.isfinite(ddim_invert(latents, predict, schedule, 0, 1)).all()
    assert torch.isfinite(ddim_denoise(unit_noise(4), predict, schedule)).all()
    # below the level without signal, inversion is as exact as ever
    returned = ddim_denoise(ddim_invert(latents, predict, schedule, 1, 16), predict, schedule, 1)
    assert torch.allclose(returned, latents, atol=1e-4)


def test_the_trajectory_is_the_schedulers_own() -> None:
    schedule = ddim_schedule(SCHEDULER, 50)
    assert schedule.timesteps[0] > schedule.timesteps[-1]
    assert schedule.alphas_cumprod == sorted(schedule.alphas_cumprod)
    assert schedule.alphas_cumprod[0] == pytest.approx(float(SCHEDULER.alphas_cumprod[schedule.timesteps[0]]))


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

    perfect = Denoiser(unet=Perfect(), text_encoder=None, tokenizer=None, scheduler=scheduler)  # type: ignore[arg-type]
    predicted = predictor(perfect, Condition(torch.zeros(1)))(noisy, 300)
    assert torch.allclose(predicted.pred_epsilon, noise, atol=1e-5)
    assert torch.allclose(predicted.pred_original_sample, clean, atol=1e-5)
    loss = denoising_loss(
        Perfect(), scheduler.alphas_cumprod, kind, clean, Condition(torch.zeros(1)), torch.tensor([300, 300]), noise
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
    images = torch.rand(2, 1, base.resolution, base.resolution) * 2 - 1
    latents = base.encode(images)
    assert latents.shape == (2, *base.latent_shape)
    assert base.decode(latents).shape == images.shape
    assert float(base.decode(latents).abs().max()) <= 1
    unscaled = base.vae.encode(images).latent_dist.mean
    assert torch.allclose(latents, unscaled * base.vae.config["scaling_factor"])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_diffusers_scripts(kind: str) -> None:
    scheduler = DDIMScheduler(prediction_type=kind, beta_schedule="scaled_linear")
    timesteps = torch.tensor([0, 50, 300, 700, 999])
    ratio = compute_snr(scheduler, timesteps)
    expected = ratio.clamp(max=5.0) / (ratio if kind == "epsilon" else ratio + 1)
    weights = min_snr_weights(scheduler.alphas_cumprod[timesteps], 5.0, kind)
    torch.testing.assert_close(weights, expected)
    assert weights[0] < 0.01
    images = min_snr_weights(scheduler.alphas_cumprod[timesteps], 5.0, "sample")
    torch.testing.assert_close(images, ratio.clamp(max=5.0))
    no_signal = min_snr_weights(torch.zeros(1), 5.0, kind)
    assert float(no_signal) == (1.0 if kind == "epsilon" else 0.0)


def test_a_weighted_loss_is_the_weighted_mean_of_the_examples() -> None:
    scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise, timesteps = torch.randn_like(latents), torch.tensor([10, 400, 900])

    class Silent(torch.nn.Module):
        def forward(self, latents: Tensor, timestep: object, context: object) -> object:
            return type("Output", (), {"sample": torch.zeros_like(latents)})

    def loss(rows: list[int], gamma: float) -> float:
        given = Silent(), scheduler.alphas_cumprod, "epsilon", latents[rows], Condition(torch.zeros(1))
        pair = denoising_pair(*given, timesteps[rows], noise[rows])
        weights = min_snr_weights(scheduler.alphas_cumprod[timesteps[rows]], gamma, "epsilon")
        return float(weighted_loss(*pair, weights if gamma else torch.ones(len(rows))))

    weights = min_snr_weights(scheduler.alphas_cumprod[timesteps], 5.0, "epsilon").tolist()
    alone = [loss([row], 0.0) for row in range(3)]
    assert loss([0, 1, 2], 5.0) == pytest.approx(sum(w * a for w, a in zip(weights, alone, strict=True)) / 3, rel=1e-5)
    assert loss([0, 1, 2], 1e9) == pytest.approx(loss([0, 1, 2], 0.0), rel=1e-4)
