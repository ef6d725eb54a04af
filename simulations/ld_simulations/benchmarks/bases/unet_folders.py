"""Randomly initialised folders as Stable Diffusion 1.4 and XL are published, of small width."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ld_simulations.benchmarks.stable_diffusion.cost import STABLE_DIFFUSION_1_4
from ld_simulations.tiny_base.networks import make_tokenizer

VAE: dict[str, Any] = {
    "act_fn": "silu",
    "block_out_channels": [32, 32, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 64,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SMALL: dict[str, Any] = {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 32, "sample_size": 16}
SCHEDULE: dict[str, Any] = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "trained_betas": None,
}
SDXL: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16,
    "attention_head_dim": [2, 4, 8],
    "block_out_channels": [32, 64, 64],
    "cross_attention_dim": 80,  # of both text encoders side by side
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 24 + 6 * 16,
    "sample_size": 8,
    "transformer_layers_per_block": [1, 1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
"""Keys of SDXL's UNet, at small width; its pooled prompt has 24 numbers."""


def write_stable_diffusion(folder: Path, prediction: str, zero_terminal_snr: bool = False) -> Path:
    """Stable Diffusion 1.4's classes and config keys, with its PNDM schedule; no index, as some copies have none.

    With zero terminal SNR, its schedule is one that was rescaled to end without signal, with trailing timesteps.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = word_tokenizer()
        parts = {
            "unet": UNet2DConditionModel(**{**STABLE_DIFFUSION_1_4, **SMALL}),
            "vae": AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(text_config(tokenizer, 32)),
            "tokenizer": tokenizer,
            "scheduler": PNDMScheduler(
                **SCHEDULE, set_alpha_to_one=False, skip_prk_steps=True, prediction_type=prediction
            ),
        }
    if zero_terminal_snr:
        without_signal = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        parts["scheduler"] = DDIMScheduler(
            **SCHEDULE, **without_signal, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction
        )
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return folder


def write_sdxl(folder: Path) -> Path:
    """Stable Diffusion XL's classes, config keys and index, with its Euler schedule."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = word_tokenizer()
        parts = {
            "unet": UNet2DConditionModel(**SDXL),
            "vae": AutoencoderKL(**{**VAE, "scaling_factor": 0.13025, "force_upcast": True}),
            "text_encoder": CLIPTextModel(text_config(tokenizer, 32)),
            "text_encoder_2": CLIPTextModelWithProjection(text_config(tokenizer, 48, projection_dim=24)),
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer,
            "scheduler": EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading"),
        }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    named = {
        name: ["diffusers" if name in ("unet", "vae", "scheduler") else "transformers", type(part).__name__]
        for name, part in parts.items()
    }
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True, **named}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def word_tokenizer() -> Any:
    """A tokenizer of 77 tokens that knows the prompts of the tests."""
    return make_tokenizer(["axial T1 brain MRI, woman, 70 years, healthy"], 77)


def text_config(tokenizer: Any, width: int, **options: Any) -> CLIPTextConfig:
    """A CLIP of two layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
