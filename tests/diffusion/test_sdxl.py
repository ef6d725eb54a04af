"""Stable Diffusion XL: the same numbers as diffusers' own pipeline, and what is exact stays exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from ld_common.adapters.lora import Lora
from ld_common.adapters.train import train
from ld_common.core.errors import ModelError
from ld_common.diffusion.base_components import parts_of
from ld_common.diffusion.base_model import BaseModel, base_digest, load_base
from ld_common.diffusion.drift import LatentDrift
from ld_common.diffusion.sampling import make_sampler, sample
from ld_common.diffusion.training import TrainingData
from ld_common.editing.counterfactuals import Edit
from tests.client.test_private import attached_of, noised_gradient, reference_gradient, study_of
from tests.editing.test_editors import GUIDED, HEALTHY, ILL, editor
from tests.support.stable_diffusion import SDXL, write_sdxl

PROMPTS = ["axial T1 brain MRI, woman, 70 years", "axial T1 brain MRI"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return load_base(str(folder))


@pytest.fixture
def pipeline(base: BaseModel, folder: Path) -> StableDiffusionXLPipeline:
    assert base.second_text is not None
    return StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        text_encoder_2=base.second_text.text_encoder,
        tokenizer=base.tokenizer,
        tokenizer_2=base.second_text.tokenizer,
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=base.scheduler,
    )


def noise_of(base: BaseModel, count: int) -> torch.Tensor:
    return torch.randn(count, *base.latent_shape, generator=torch.Generator().manual_seed(0))


def test_prompts_are_embedded_as_diffusers_does(base: BaseModel, pipeline: StableDiffusionXLPipeline) -> None:
    words, none, pooled, no_pooled = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=True)
    with torch.no_grad():
        context, empty = base.embed(PROMPTS), base.embed(["", ""])
    torch.testing.assert_close(context[:, :-1], words)
    torch.testing.assert_close(context[:, -1, : pooled.shape[1]], pooled)
    torch.testing.assert_close(empty[:, :-1], none)
    torch.testing.assert_close(empty[:, -1, : pooled.shape[1]], no_pooled)


def test_a_sample_is_that_of_diffusers_pipeline(base: BaseModel, pipeline: StableDiffusionXLPipeline) -> None:
    pipeline.set_progress_bar_config(disable=True)
    noise, side = noise_of(base, 2), base.resolution
    theirs = pipeline(
        PROMPTS, latents=noise, guidance_scale=1.0, num_inference_steps=6, output_type="latent", height=side, width=side
    ).images
    with torch.no_grad():
        ours = sample(base, base.embed(PROMPTS), noise, make_sampler(base.scheduler, "ddim", 6))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{"name": "lora", "rank": 2}, {"name": "custom_diffusion"}])
def test_a_patients_gradient_is_the_plain_one(folder: Path, adapter: dict[str, object]) -> None:
    study = study_of(adapter, max_grad_norm=1e3)  # no gradient is that long
    adapted, rows = attached_of(folder, study), torch.tensor([[0, 1], [2, 2], [5, 3]])
    found, expected = noised_gradient(adapted, study, rows, 0.0), reference_gradient(adapted, study, rows)
    largest = max(float(value.abs().max()) for value in expected)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) < 1e-5 * largest


@pytest.mark.parametrize("name", ["belm", "ddpm", "flowedit"])
def test_an_exact_editor_returns_every_scan(base: BaseModel, name: str) -> None:
    exact = editor(base, name, noise_fraction=0.6)
    latents = noise_of(base, 2)
    inverted = exact.invert(latents, [HEALTHY, ILL])
    assert float((exact.redraw(inverted) - latents).abs().max()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GUIDED if name != "instruct_pix2pix"])
def test_another_prompt_changes_the_answer(base: BaseModel, name: str) -> None:
    """All editors but those that need another network or a longitudinal drift; pix2pix_zero steers its attention."""
    latent_editor = editor(base, name, noise_fraction=0.8, guidance_scale=3.0)
    scans = latent_editor.invert(noise_of(base, 1), [HEALTHY])
    answers = latent_editor.edit(scans, [Edit(0, HEALTHY), Edit(0, ILL)])
    assert float((answers[0] - answers[1]).abs().max()) > 1e-4


def test_an_adapter_learns_a_drifted_set(base: BaseModel) -> None:
    """The frozen parts stay, and the copy that trains has encoders of its own."""
    data = TrainingData(noise_of(base, 8) + 0.5, [PROMPTS[0]] * 8, LatentDrift(torch.full((4, 1, 1), 0.5), "centred"))
    before = {name: value.clone() for name, value in base.unet.named_parameters()}
    losses: list[float] = []
    adapted = train(
        base,
        Lora(rank=2),
        data,
        steps=20,
        batch_size=8,
        learning_rate=5e-3,
        on_step=lambda _, loss: losses.append(loss),
    )
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(torch.equal(value, before[name]) for name, value in base.unet.named_parameters())
    assert adapted.model.second_text is not base.second_text


def test_every_part_decides_the_hash_and_a_refiner_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    digest = base_digest(str(copy))
    assert digest == base_digest(str(folder))
    for part in parts_of(copy):
        file = next(path for path in sorted((copy / part).glob("*.json")))
        content = file.read_text()
        file.write_text(content.replace("{", '{"more": 1, ', 1))
        assert base_digest(str(copy)) != digest, part
        file.write_text(content)
    index = copy / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "force_zeros_for_empty_prompt": False}))
    assert base_digest(str(copy)) != digest
    index.write_text(json.dumps({**content, "force_zeros_for_empty_prompt": "false"}))
    with pytest.raises(ModelError, match="write true or false"):
        base_digest(str(copy))
    index.write_text(json.dumps(content))
    refiner = {**SDXL, "projection_class_embeddings_input_dim": 24 + 5 * SDXL["addition_time_embed_dim"]}
    UNet2DConditionModel(**refiner).save_pretrained(copy / "unet")
    with pytest.raises(ModelError, match="takes 8 numbers of a pooled prompt, text_encoder_2 makes 24: refiners do"):
        load_base(str(copy))
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(ModelError, match="lacks text_encoder_2"):
        load_base(str(copy))
    (copy / "model_index.json").unlink()  # as if it were of Stable Diffusion 1
    with pytest.raises(ModelError, match="addition_embed_type text_time"):
        load_base(str(copy))
