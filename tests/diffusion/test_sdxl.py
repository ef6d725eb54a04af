"""Stable Diffusion XL: the same numbers as diffusers' own pipeline; what every base does is in test_every_base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from ld_common.core.errors import ModelError
from ld_common.diffusion.base_components import parts_of
from ld_common.diffusion.base_model import BaseModel, base_digest, load_base
from ld_common.diffusion.bases.sdxl import XlText
from ld_common.diffusion.sampling import make_sampler, sample
from ld_simulations.benchmarks.bases.unet_folders import SDXL, write_sdxl

PROMPTS = ["axial T1 brain MRI, woman, 70 years", "axial T1 brain MRI"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return load_base(str(folder))


@pytest.fixture
def pipeline(base: BaseModel, folder: Path) -> StableDiffusionXLPipeline:
    assert isinstance(base.reader, XlText)
    (first, tokenizer), (second, second_tokenizer) = base.reader.first, base.reader.second
    return StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=second_tokenizer,
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
