from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import load_base
from ld_common.diffusion.drift import LatentDrift, drift_from_shift
from ld_common.diffusion.sampling import SAMPLERS, SPACINGS, make_sampler, sample
from ld_simulations.benchmarks.bases.gaussian import DATA_MEAN, NO_CONTEXT, SCHEDULER, gaussian_model, unit_noise
from ld_simulations.tiny_base.networks import make_scheduler

PLAIN: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "dpm-solver++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}
MEAN = LatentDrift(torch.full((1, 1, 1), DATA_MEAN))
COUNT = 4000


def drawn_mean(model: Any, sampler: Any, drift: LatentDrift | None) -> float:
    return float(sample(model, NO_CONTEXT.expand(COUNT, -1, -1), unit_noise(COUNT), sampler, drift, COUNT).mean())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SAMPLERS)
@torch.no_grad()
def test_without_drift_sampling_is_bit_for_bit_the_plain_scheduler(tiny_base: Path, name: str, precision: str) -> None:
    base = load_base(str(tiny_base), precision=precision)
    context = base.embed(["a scan", "another one"])
    noise = torch.randn(2, *base.latent_shape, generator=torch.Generator().manual_seed(0)).to(base.dtype)
    scheduler = PLAIN[name].from_config(base.scheduler.config)
    scheduler.set_timesteps(7)
    before = torch.get_rng_state()
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = base.unet(scheduler.scale_model_input(latents, timestep), timestep, context).sample
        latents = scheduler.step(output, timestep, latents).prev_sample
    ours = sample(base, context, noise, make_sampler(base.scheduler, name, 7))
    assert ours.dtype == base.dtype
    assert torch.equal(ours, latents)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(
    ("name", "spacing"),
    [pair for pair in itertools.product(SAMPLERS, SPACINGS) if pair != ("ddim", "linspace")],
)
def test_the_drift_recentres_whatever_the_sampler_its_steps_and_their_spacing(
    name: str, spacing: str, steps: int
) -> None:
    sampler = make_sampler(SCHEDULER, name, steps, spacing)
    assert drawn_mean(gaussian_model(), sampler, MEAN) == pytest.approx(DATA_MEAN, abs=0.02)
    assert abs(drawn_mean(gaussian_model(), sampler, None) - DATA_MEAN) > 0.03


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_epsilon_and_v_networks_are_recentred_alike(name: str, kind: str) -> None:
    scheduler = DDIMScheduler.from_config(SCHEDULER.config, prediction_type=kind)
    sampler = make_sampler(scheduler, name, 25)
    assert drawn_mean(gaussian_model(scheduler), sampler, MEAN) == pytest.approx(DATA_MEAN, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [20, 100])
def test_a_centred_network_and_a_noise_network_draw_the_data_too(kind: str, steps: int) -> None:
    """`centred` learns data of mean 0; `noise` learns under noise of mean δ: both return the data's own mean."""
    scheduler = DDIMScheduler.from_config(SCHEDULER.config, prediction_type=kind)
    sampler = make_sampler(scheduler, "ddim", steps)
    centred = LatentDrift(MEAN.mean, "centred")
    assert drawn_mean(gaussian_model(scheduler, mean=0.0), sampler, centred) == pytest.approx(DATA_MEAN, abs=0.02)
    noise = LatentDrift(drift_from_shift(0.1, scheduler.alphas_cumprod), "noise")
    own = drawn_mean(gaussian_model(scheduler, noise_mean=0.1), sampler, noise)
    plain = drawn_mean(gaussian_model(scheduler), sampler, None)
    # self-consistent, and therefore inert: it neither mends nor worsens the leak of plain diffusion
    assert own == pytest.approx(plain, abs=0.005)


def test_the_shared_shift_means_the_same_at_any_number_of_steps_and_the_literal_one_does_not() -> None:
    def moved(formulation: str, steps: int) -> float:
        drift = LatentDrift(drift_from_shift(0.1, SCHEDULER.alphas_cumprod), formulation)
        sampler = make_sampler(SCHEDULER, "ddim", steps)
        return drawn_mean(gaussian_model(), sampler, drift) - drawn_mean(gaussian_model(), sampler, None)

    shared = [moved("per-step", steps) for steps in (10, 50)]
    literal = [moved("per-step-literal", steps) for steps in (10, 50)]
    assert shared[0] == pytest.approx(shared[1], rel=0.25)
    assert literal[1] > 4 * literal[0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_with_trailing_steps_needs_no_drift(name: str) -> None:
    scheduler = make_scheduler(zero_terminal_snr=True)
    sampler = make_sampler(scheduler, name, 25)
    assert int(sampler.timesteps[0]) == 999
    model = gaussian_model(scheduler)
    assert drawn_mean(model, sampler, None) == pytest.approx(DATA_MEAN, abs=0.02)
    assert drawn_mean(model, sampler, MEAN) == pytest.approx(DATA_MEAN, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ddpm", 10), "known: ddim"),
        (("ddim", 10, "backwards"), "known: leading"),
        (("ddim", 10, "linspace"), "use leading or trailing"),
        (("ddim", 0), "steps is 0"),
        (("ddim", 1001), "steps is 1001"),
    ],
)
def test_a_sampler_that_cannot_be_made_is_named(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_sampler(SCHEDULER, *arguments)
