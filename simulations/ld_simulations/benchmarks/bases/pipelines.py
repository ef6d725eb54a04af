"""The same samples by diffusers' own pipelines, to compare ours with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from ld_common.diffusion.base_components import FLUX_2, STABLE_DIFFUSION_3, family_of
from ld_common.diffusion.base_model import BaseModel
from ld_common.diffusion.bases.sdxl import XlText


def draw_by_pipeline(base: BaseModel, folder: Path, prompts: list[str], noise: Tensor, steps: int) -> Tensor:
    """Latents `(B,C,h,w)` as the VAE takes them.

    Args:
        base: the base that is loaded.
        folder: the base's, from which the pipeline loads by itself but for the scheduler of bases of β.
        prompts: B prompts.
        noise: `(B,C,h,w)`.
        steps: of the sampler; guidance is off.
    """
    family = family_of(folder)
    if family in (STABLE_DIFFUSION_3, FLUX_2):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    else:
        # ours takes DDIM's steps whatever scheduler the folder names
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
        parts: dict[str, Any] = {"vae": base.vae, "unet": unet, "scheduler": base.scheduler}
        if isinstance(base.reader, XlText):
            (first, tokenizer), (second, second_tokenizer) = base.reader.first, base.reader.second
            parts |= {"text_encoder": first, "tokenizer": tokenizer}
            pipeline = diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=second_tokenizer)
        else:
            parts |= {"text_encoder": base.text_encoder, "tokenizer": base.tokenizer}
            beside = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = diffusers.StableDiffusionPipeline(**parts, **beside)
    pipeline.set_progress_bar_config(disable=True)
    side = base.resolution
    drawn: Tensor = pipeline(
        prompt=prompts,
        latents=noise.clone(),
        guidance_scale=1.0,
        num_inference_steps=steps,
        output_type="latent",
        height=side,
        width=side,
    ).images
    return drawn if family is FLUX_2 else base.scaling.unscaled(torch.as_tensor(drawn))
