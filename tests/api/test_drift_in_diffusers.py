"""`LatentDrift` in a plain diffusers pipeline and in a plain training loop: the same as our own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ld_common import BaseModel, LatentDrift, TrainingData, load_base
from ld_common.core.errors import ConfigError
from ld_common.diffusion.options import TrainingConfig
from ld_common.diffusion.sampling import make_sampler, sample
from ld_common.diffusion.training import LossSampler

PROMPT = "axial T1 brain MRI, woman, 70 years, healthy"
STEPS = 6
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
}


@pytest.fixture(scope="module")
def base(smallest_base: Path) -> BaseModel:
    return load_base(str(smallest_base))


@pytest.fixture(scope="module")
def pipe(smallest_base: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(smallest_base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def scheduler_of(base: BaseModel, name: str = "ddim") -> Any:
    import diffusers

    return getattr(diffusers, SCHEDULERS[name]).from_config(base.scheduler.config)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def drawn(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """What the plain pipeline draws, in latents, without classifier-free guidance."""
    options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent"}
    images: torch.Tensor = pipe([PROMPT] * len(latents), latents=latents, **options).images
    return images


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("shape", ["scalar", "channel", "map"])
def test_a_plain_pipeline_samples_under_the_drift_as_our_sampler_does(
    base: BaseModel, pipe: Any, name: str, shape: str
) -> None:
    pipe.scheduler = scheduler_of(base, name)
    drift = LatentDrift.estimate(torch.randn(9, 4, 4, 4, generator=generator()) + 1.5, base, shape=shape)
    theirs = drawn(pipe, drift.initial_latents(pipe.scheduler, (2, 4, 4, 4), generator(), num_inference_steps=STEPS))
    noise = torch.randn(2, 4, 4, 4, generator=generator())
    with torch.no_grad():
        context = base.embed([PROMPT]).expand(2, -1, -1)
    sampler = make_sampler(base.scheduler, name, STEPS)
    ours = sample(base, context, noise, sampler, drift)
    assert torch.allclose(theirs, ours, atol=1e-5)
    assert not torch.allclose(ours, sample(base, context, noise, sampler), atol=1e-2)


def test_no_drift_is_bit_identical_to_the_plain_pipeline(base: BaseModel, pipe: Any) -> None:
    pipe.scheduler = scheduler_of(base)
    none = LatentDrift(torch.zeros(4, 1, 1))
    noise = torch.randn(1, 4, 4, 4, generator=generator())
    latents = none.initial_latents(pipe.scheduler, noise.shape, generator(), num_inference_steps=STEPS)
    assert torch.equal(latents, noise)
    assert none.training_noise(noise, pipe.scheduler) is noise
    assert none.training_latents(noise) is noise
    with torch.no_grad():
        context = base.embed([PROMPT])
    assert torch.equal(drawn(pipe, latents), sample(base, context, noise, make_sampler(base.scheduler, steps=STEPS)))


def test_the_pipelines_scheduler_is_left_alone(base: BaseModel) -> None:
    scheduler = scheduler_of(base)
    before = scheduler.timesteps.clone()
    LatentDrift(torch.ones(4, 1, 1)).initial_latents(scheduler, (1, 4, 4, 4), generator())
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.num_inference_steps is None


@pytest.mark.parametrize("formulation", ["centred", "noise", "per-step", "per-step-literal"])
def test_what_latents_alone_cannot_do_is_refused(base: BaseModel, formulation: str) -> None:
    drift = LatentDrift(torch.ones(4, 1, 1), formulation)
    with pytest.raises(ConfigError, match=formulation):
        drift.initial_latents(base.scheduler, (1, 4, 4, 4))


@pytest.mark.parametrize("formulation", ["prior", "centred", "noise", "per-step"])
def test_a_plain_training_loop_has_the_loss_of_ours(base: BaseModel, pipe: Any, formulation: str) -> None:
    scheduler = scheduler_of(base)
    latents = torch.randn(1, 4, 4, 4, generator=generator()) + 1
    drift = LatentDrift(torch.tensor([1.0, -1.0, 0.5, 0.0])[:, None, None], formulation)
    options = TrainingConfig(batch_size=1, noise_offset=0.0, conditioning_dropout_prob=0.0)
    data = TrainingData(latents, [PROMPT], drift=drift)
    ours = LossSampler(base, {}, data, options, generator()).loss()

    draws = generator()
    torch.randint(1, (1,), generator=draws), torch.rand(1, generator=draws)  # row and dropout of our sampler
    timesteps = (1000 * (1 - torch.rand(1, generator=draws))).long()
    noise = torch.randn(latents.shape, generator=draws)
    noisy = scheduler.add_noise(drift.training_latents(latents), drift.training_noise(noise, scheduler), timesteps)
    theirs = F.mse_loss(pipe.unet(noisy, timesteps, base.embed([PROMPT])).sample, noise)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_an_unknown_shape_is_refused(base: BaseModel) -> None:
    for shape, words in (("chanel", "known: scalar, channel, map"), ("conditional", "ConditionalDrift")):
        with pytest.raises(ConfigError, match=words):
            LatentDrift.estimate(torch.zeros(2, 4, 4, 4), base, shape=shape)
