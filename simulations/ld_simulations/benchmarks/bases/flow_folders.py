"""Randomly initialised folders as Stable Diffusion 3.5 and FLUX.2 klein are published, of small width."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    SD3Transformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from ld_simulations.benchmarks.bases.unet_folders import VAE, text_config, word_tokenizer

SD3: dict[str, Any] = {
    "attention_head_dim": 8,
    "caption_projection_dim": 32,
    "dual_attention_layers": [0],
    "in_channels": 16,
    "joint_attention_dim": 96,
    "num_attention_heads": 4,
    "num_layers": 2,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 40,
    "pos_embed_max_size": 12,
    "qk_norm": "rms_norm",
    "sample_size": 8,
}
"""Keys of SD3.5's transformer."""
FLUX2: dict[str, Any] = {
    "attention_head_dim": 8,
    "axes_dims_rope": [2, 2, 2, 2],
    "guidance_embeds": False,
    "in_channels": 32,
    "joint_attention_dim": 48,
    "mlp_ratio": 2.0,
    "num_attention_heads": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "timestep_guidance_channels": 16,
}
"""Keys of FLUX.2 klein's transformer."""
CHAT = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)
WORDS = "axial T1 brain MRI, woman, man, 70 years, healthy ill a scan user assistant"


def write_sd3(folder: Path, with_t5: bool = True) -> Path:
    """Stable Diffusion 3.5's classes, config keys and index."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = word_tokenizer()
        parts: dict[str, Any] = {
            "transformer": SD3Transformer2DModel(**SD3),
            "vae": AutoencoderKL(
                **{**VAE, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            "text_encoder": CLIPTextModelWithProjection(text_config(tokenizer, 32, projection_dim=16)),
            "text_encoder_2": CLIPTextModelWithProjection(text_config(tokenizer, 48, projection_dim=24)),
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer,
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        }
        if with_t5:
            words = _words(["<pad>", "</s>", "<unk>"])
            config = T5Config(
                vocab_size=len(words), d_model=96, d_kv=8, d_ff=64, num_layers=2, num_heads=4, is_gated_act=True
            )
            parts |= {"text_encoder_3": T5EncoderModel(config), "tokenizer_3": words}
    return _save(folder, "StableDiffusion3Pipeline", parts)


def write_flux2(folder: Path) -> Path:
    """FLUX.2 klein's classes, config keys and index; `sample_size` is ours, for pictures of 64 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        words = _words(["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"])
        words.chat_template = CHAT
        vae = AutoencoderKLFlux2(
            **{key: value for key, value in VAE.items() if key != "latent_channels"}, latent_channels=8
        )
        vae.bn.running_mean.normal_(0, 0.2)
        vae.bn.running_var.uniform_(0.5, 2)
        config = Qwen3Config(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
        parts = {
            "transformer": Flux2Transformer2DModel(**FLUX2),
            "vae": vae,
            "text_encoder": Qwen3ForCausalLM(config),
            "tokenizer": words,
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        }
    _save(folder, "Flux2KleinPipeline", parts)
    file = folder / "transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sample_size": 8}))
    return folder


def _save(folder: Path, pipeline: str, parts: dict[str, Any]) -> Path:
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index: dict[str, Any] = {"_class_name": pipeline}
    for name, part in parts.items():
        library = "diffusers" if name in ("transformer", "vae", "scheduler") else "transformers"
        index[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _words(special: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and single letters."""
    letters = [chr(code) for code in range(33, 127)]
    names = list(dict.fromkeys([*special, *WORDS.replace(",", " ,").split(), *letters]))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(",", "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=special[2:]
    )
