"""Bases of flow matching: the numbers of diffusers' own pipelines, and what is only true of flows."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, StableDiffusion3Pipeline
from torch import Tensor

from ld_common.core.errors import ConfigError, ModelError
from ld_common.diffusion.base_components import parts_of
from ld_common.diffusion.base_model import BaseModel, base_digest, load_base, load_denoiser
from ld_common.diffusion.bases.flow import FlowSchedule
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.drift import LatentDrift, drift_from_shift, is_inert
from ld_common.diffusion.flow import flow_prediction, flow_scale, flow_signal, flow_time
from ld_common.diffusion.loss import denoising_pair, min_snr_weights
from ld_common.diffusion.sampling import make_sampler, sample
from ld_common.diffusion.schedule import add_noise, ddim_denoise, ddim_schedule, predictor
from ld_common.editing.flowedit import FlowEdit
from ld_simulations.benchmarks.bases.flow_folders import write_flux2, write_sd3
from ld_simulations.benchmarks.bases.gaussian import DATA_MEAN, NO_CONTEXT, gaussian_model, unit_noise
from tests.diffusion.test_sampling import drawn_mean
from tests.editing.test_editors import HEALTHY, ILL

PROMPTS = ["axial T1 brain MRI, woman, 70 years", "axial T1 brain MRI"]
SCHEDULE = FlowSchedule(
    FlowMatchEulerDiscreteScheduler(shift=3.0), lambda scheduler, steps: scheduler.set_timesteps(steps)
)
MEAN = torch.full((1, 1, 1), DATA_MEAN)


@pytest.fixture(scope="module", params=["sd3", "sd3 without T5"])
def sd3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd3(tmp_path_factory.mktemp("sd3"), with_t5=request.param == "sd3")


@pytest.fixture(scope="module")
def flux2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux2(tmp_path_factory.mktemp("flux2"))


def noise_of(base: BaseModel) -> Tensor:
    return torch.randn(2, *base.latent_shape, generator=torch.Generator().manual_seed(0))


def drawn(base: BaseModel, steps: int) -> Tensor:
    with torch.no_grad():
        return sample(base, base.embed(PROMPTS), noise_of(base), make_sampler(base.scheduler, "euler", steps))


def test_sd3_is_that_of_diffusers_pipeline(sd3: Path) -> None:
    base = load_base(str(sd3))
    missing = {} if (sd3 / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3, **missing)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        words, none, pooled, no_pooled = pipeline.encode_prompt(PROMPTS, None, None)
        context, empty = base.embed(PROMPTS), base.embed(["", ""])
    torch.testing.assert_close(context[:, :-1], words, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(empty[:, :-1], none, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(context[:, -1, : pooled.shape[1]], pooled)
    torch.testing.assert_close(empty[:, -1, : pooled.shape[1]], no_pooled)
    theirs = pipeline(
        prompt=PROMPTS,
        latents=noise_of(base),
        guidance_scale=1.0,
        num_inference_steps=6,
        output_type="latent",
        height=64,
        width=64,
    ).images
    torch.testing.assert_close(drawn(base, 6), theirs, rtol=1e-4, atol=1e-4)


def test_flux2_is_that_of_diffusers_pipeline(flux2: Path) -> None:
    base, pipeline = load_base(str(flux2)), Flux2KleinPipeline.from_pretrained(flux2)
    pipeline.set_progress_bar_config(disable=True)
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        ours = base.scaling.scaled(base.vae.encode(pictures).latent_dist.mean)
        torch.testing.assert_close(ours, pipeline._encode_vae_image(pictures, None))
    theirs = pipeline(
        prompt=PROMPTS,
        latents=noise_of(base),
        guidance_scale=1.0,
        num_inference_steps=6,
        output_type="latent",
        height=64,
        width=64,
    ).images
    torch.testing.assert_close(base.scaling.unscaled(drawn(base, 6)), theirs, rtol=1e-4, atol=1e-4)


def test_every_part_of_a_flow_decides_the_hash(flux2: Path) -> None:
    digest = base_digest(str(flux2))
    for part in parts_of(flux2):
        for file in sorted((flux2 / part).iterdir()):
            if file.suffix in (".json", ".jinja"):
                content = file.read_text()
                file.write_text(content + " ")
                assert base_digest(str(flux2)) != digest, file
                file.write_text(content)
    assert base_digest(str(flux2)) == digest


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("transformer/config.json", "guidance_embeds", True, "has guidance_embeds: of FLUX.2, klein loads"),
        ("transformer/config.json", "sample_size", 7, "sample_size 7: write the height"),
        ("transformer/config.json", "in_channels", 16, "takes 16 channels, its vae makes 32"),
        ("scheduler/scheduler_config.json", "_class_name", "DDIMScheduler", "the scheduler of .* is a DDIMScheduler"),
        ("scheduler/scheduler_config.json", "stochastic_sampling", True, "has stochastic_sampling: bases of plain"),
        ("text_encoder/config.json", "architectures", ["Mistral3ForConditionalGeneration"], "is a Mistral3For"),
        ("transformer/config.json", "_class_name", "FluxTransformer2DModel", "is a Flux2KleinPipeline"),
    ],
)
def test_what_is_no_klein_is_named(flux2: Path, part: str, key: str, value: Any, words: str) -> None:
    file = flux2 / part
    content = file.read_text()
    file.write_text(json.dumps({**json.loads(content), key: value}))
    try:
        with pytest.raises(ModelError, match=words):
            load_denoiser(str(flux2))
    finally:
        file.write_text(content)


def test_a_flow_and_unit_variance_are_one_scale_apart() -> None:
    clean, noise = unit_noise(3, seed=1), unit_noise(3, seed=2)
    for time in (0.0, 0.2, 0.5, 1.0):
        signal = flow_signal(torch.tensor(time, dtype=torch.float64))
        assert float(flow_time(signal)) == pytest.approx(time, abs=1e-12)
        unit = signal**0.5 * clean + (1 - signal) ** 0.5 * noise
        flow = (1 - time) * clean + time * noise
        torch.testing.assert_close(unit * flow_scale(signal), flow)
        original, epsilon = flow_prediction(unit, noise - clean, signal)
        torch.testing.assert_close(original, clean)
        torch.testing.assert_close(epsilon, noise)


def test_ddims_steps_are_eulers_of_the_flow() -> None:
    model, noise = gaussian_model(SCHEDULE), unit_noise(4)
    euler = sample(model, NO_CONTEXT.expand(4, -1, -1), noise, make_sampler(SCHEDULE, "euler", 12))
    ours = ddim_denoise(noise, predictor(model, Condition(NO_CONTEXT)), ddim_schedule(SCHEDULE, 12))
    torch.testing.assert_close(ours, euler, rtol=1e-5, atol=1e-5)  # diffusers' steps are in float32


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_a_flow_leaks_nothing_and_a_prior_drift_is_inert(steps: int) -> None:
    """It begins without signal, so samples of any data lie around their own mean; `centred` learns what is left."""
    sampler = make_sampler(SCHEDULE, "euler", steps)
    plain = drawn_mean(gaussian_model(SCHEDULE), sampler, None)
    assert plain == pytest.approx(DATA_MEAN, rel=0.05)
    for formulation in ("prior", "noise", "per-step", "per-step-literal"):
        assert drawn_mean(gaussian_model(SCHEDULE), sampler, LatentDrift(MEAN, formulation)) == plain
        assert is_inert(formulation, gaussian_model(SCHEDULE))
    centred = LatentDrift(MEAN, "centred")
    assert drawn_mean(gaussian_model(SCHEDULE, mean=0.0), sampler, centred) == pytest.approx(DATA_MEAN, rel=0.05)
    assert not is_inert("centred", gaussian_model(SCHEDULE))
    with pytest.raises(ConfigError, match="ends without signal"):
        drift_from_shift(0.1, SCHEDULE.alphas_cumprod)


def test_the_loss_is_that_of_flow_matching() -> None:
    """The network sees (1 - σ) z_0 + σ ε at its own time, and its target is ε - z_0."""
    clean, noise, timesteps = unit_noise(3, seed=1), unit_noise(3, seed=2), torch.tensor([0, 499, 999])
    seen: list[Tensor] = []

    class Recording(torch.nn.Module):
        def forward(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Any:
            seen.append(latents)
            return gaussian_model(SCHEDULE).unet(latents, 3)

    _, target = denoising_pair(
        Recording(), SCHEDULE.alphas_cumprod, "flow", clean, Condition(NO_CONTEXT), timesteps, noise
    )
    times = (timesteps + 1).double().view(-1, 1, 1, 1) / 1000
    torch.testing.assert_close(seen[0], (1 - times) * clean + times * noise, rtol=1e-5, atol=1e-5)
    assert torch.equal(target, noise - clean)


def test_min_snr_weighs_the_error_of_the_image_alike() -> None:
    """An error e of the output is σ e of the image, whatever is predicted."""
    signal = flow_signal(torch.tensor([0.1, 0.5, 0.9]))
    ratio = signal / (1 - signal)
    of_image = min_snr_weights(signal, 5.0, "sample")
    torch.testing.assert_close(of_image, ratio.clamp(max=5.0))
    torch.testing.assert_close(min_snr_weights(signal, 5.0, "flow"), of_image * torch.tensor([0.1, 0.5, 0.9]) ** 2)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_flowedit_is_its_native_form(sd3: Path, fraction: float) -> None:
    """arXiv 2412.08629, Algorithm 1 with one sample a step: z + Σ Δσ (v(z_target) - v(z_source))."""
    base, steps, scale = load_base(str(sd3)), 8, 2.0
    editor = FlowEdit(num_inference_steps=steps, noise_fraction=fraction, guidance_scale=scale)
    context = editor.context(base, None)
    latents = noise_of(base)
    with torch.no_grad():
        source, target = (Condition(base.embed([prompt] * 2)) for prompt in (HEALTHY, ILL))
    noise = torch.randn(2, editor.noise_count(context), *base.latent_shape, generator=torch.Generator().manual_seed(5))
    ours = editor.edit(context, editor.invert(context, latents, source, noise), source, target, None)
    sampler = make_sampler(base.scheduler, "euler", steps)
    times = [*((float(step) + 1) / 1000 for step in sampler.timesteps), 0.0][context.start :]
    edited = latents.clone()
    for row, (time, following) in enumerate(itertools.pairwise(times)):
        of_source = (1 - time) * latents + time * noise[:, row]
        of_target = edited + of_source - latents
        with torch.no_grad():
            timestep = sampler.timesteps[context.start + row]
            plain = base.unet(of_source, timestep, source.context).sample
            one, other = (base.unet(of_target, timestep, text.context).sample for text in (source, target))
        edited = edited + (following - time) * (one + scale * (other - one) - plain)
    torch.testing.assert_close(ours, edited, rtol=1e-3, atol=1e-4)
    assert float((ours - latents).abs().max()) > 1e-3


def test_a_level_of_the_flow_is_drawn_as_its_forward_process(sd3: Path) -> None:
    schedule = ddim_schedule(load_denoiser(str(sd3)).scheduler, 4)
    assert schedule.alphas_cumprod[0] == pytest.approx(0, abs=1e-9)
    assert schedule.alphas_cumprod[-1] == 1
    predicted = type("Level", (), {"pred_original_sample": torch.ones(1), "pred_epsilon": torch.zeros(1)})()
    levels = [float(add_noise(predicted, signal)) for signal in schedule.alphas_cumprod]
    assert levels == sorted(levels)
