"""Trains the tiny base model: a folder in Stable Diffusion's own format, from generic pictures alone.

Stages, each resumable and kept under `work`: pictures -> tokenizer -> VAE -> UNet with its text encoder -> folder.
The model card is written by `ld_simulations.base_card`, which may look at the demo's scans; nothing here may.

    python -m ld_simulations.base_model --config configs/base_model.yaml
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ld_common.config import load_config, require, to_mapping
from ld_common.seeding import derive_seed, numpy_generator, torch_generator
from ld_simulations.generic_pictures import generic_picture

VOCABULARY_SIZE = 1200


@dataclass
class StageConfig:
    """How long and how fast one network learns."""

    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        require(self.steps > 0 and self.batch_size > 0, "a stage needs steps and batch_size above 0")


@dataclass
class BaseModelConfig:
    """The tiny base model's recipe; the defaults are those of the committed model."""

    seed: int = 0
    work: str = "runs/base_model"
    """Folder for pictures, checkpoints and logs; a stopped run goes on from here."""
    output: str = "simulations/tiny_base"
    pictures: int = 16000
    side: int = 64
    """Height and width of the pictures, in pixels."""
    latent_channels: int = 8
    vae_channels: list[int] = field(default_factory=lambda: [16, 32, 64])
    unet_channels: list[int] = field(default_factory=lambda: [48, 96])
    text_width: int = 96
    text_tokens: int = 64
    """Longest prompt, in tokens."""
    kl_weight: float = 1e-4
    """Weight of the VAE's KL term beside the mean squared error of pixels in [-1, 1]."""
    caption_dropout: float = 0.1
    vae: StageConfig = field(default_factory=lambda: StageConfig(6500, 8, 2e-3))
    unet: StageConfig = field(default_factory=lambda: StageConfig(6000, 16, 8e-4))


def make_pictures(config: BaseModelConfig, work: Path) -> tuple[Tensor, list[str]]:
    """All pictures `(N, 1, H, W)`, uint8, and their captions; drawn once, then read back."""
    pixels_file, captions_file = work / "pictures.npy", work / "captions.json"
    if not captions_file.exists():
        rng = numpy_generator(config.seed, "generic-pictures")
        pixels = np.empty((config.pictures, 1, config.side, config.side), np.uint8)
        captions = []
        for index in range(config.pictures):
            picture = generic_picture(rng, config.side)
            pixels[index, 0] = np.round((picture.pixels + 1) * 127.5)
            captions.append(picture.caption)
        np.save(pixels_file, pixels)
        captions_file.write_text(json.dumps(captions))
    return torch.from_numpy(np.load(pixels_file)), json.loads(captions_file.read_text())


def make_tokenizer(captions: list[str], max_tokens: int) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's form; any text can be written in it, generic captions shortest."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 2,
        initial_alphabet=sorted(alphabet),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    state = json.loads(bpe.to_str())["model"]
    # every byte must also exist as the last one of a word, or an unseen word would end in an unknown token
    pieces = sorted({*alphabet, *(f"{byte}</w>" for byte in alphabet)})
    merges = [tuple(pair) for pair in state["merges"]]
    for left, right in merges:
        if left + right not in pieces:
            pieces.append(left + right)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    vocabulary["<|startoftext|>"] = len(vocabulary)
    vocabulary["<|endoftext|>"] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_tokens)


def make_vae(config: BaseModelConfig) -> AutoencoderKL:
    """An untrained AutoencoderKL for one grey channel; its residual branches start at zero and learn faster so."""
    levels = len(config.vae_channels)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=tuple(config.vae_channels),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=config.latent_channels,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=config.side,
    )
    for block in vae.modules():
        if isinstance(block, ResnetBlock2D):
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
    return vae


def make_unet(config: BaseModelConfig) -> UNet2DConditionModel:
    """An untrained UNet; attention, to itself and to the prompt, from the second level down."""
    levels = len(config.unet_channels)
    return UNet2DConditionModel(
        sample_size=config.side // 2 ** (len(config.vae_channels) - 1),
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        block_out_channels=tuple(config.unet_channels),
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=config.text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_text_encoder(config: BaseModelConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder of two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=config.text_tokens,
            projection_dim=config.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.4's noise schedule; it ends at signal level 0.068, not 0."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def train_vae(config: BaseModelConfig, pixels: Tensor, work: Path) -> AutoencoderKL:
    """Train the VAE on flipped and turned pictures: mean squared error and a little KL."""
    torch.manual_seed(derive_seed(config.seed, "vae-init"))
    vae = make_vae(config)
    draws = torch_generator(config.seed, "vae-batches")
    noise = torch_generator(config.seed, "vae-noise")

    def loss() -> Tensor:
        rows = torch.randint(len(pixels), (config.vae.batch_size,), generator=draws)
        turns, flip = torch.randint(4, (2,), generator=draws).tolist()
        images = torch.rot90(to_model_range(pixels[rows]), turns, (2, 3))
        images = images.flip(3) if flip % 2 else images
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=noise)
            restored = vae.decode(latents).sample
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var - 1 - posterior.logvar).mean()
        return F.mse_loss(restored.float(), images) + config.kl_weight * kl

    train_stage("vae", config.vae, vae, loss, [draws, noise], work)
    return vae


def encode_pictures(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Unscaled latent means of all pictures and of their mirror images, `(2N, C, h, w)`, float16."""
    parts = []
    with torch.no_grad():
        for chunk in pixels.split(256):
            for images in (to_model_range(chunk), to_model_range(chunk).flip(3)):
                parts.append(vae.encode(images).latent_dist.mean.half())
    plain, mirrored = torch.cat(parts[0::2]), torch.cat(parts[1::2])
    return torch.cat([plain, mirrored])


def train_unet(
    config: BaseModelConfig, latents: Tensor, tokens: Tensor, tokenizer: CLIPTokenizer, work: Path
) -> nn.ModuleDict:
    """Train UNet and text encoder together on scaled latents `(2N, C, h, w)`; returns their averaged weights."""
    torch.manual_seed(derive_seed(config.seed, "unet-init"))
    network = nn.ModuleDict({"unet": make_unet(config), "text_encoder": make_text_encoder(config, tokenizer)})
    alphas_cumprod = make_scheduler().alphas_cumprod
    draws = torch_generator(config.seed, "unet-batches")
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids

    def loss() -> Tensor:
        size = config.unet.batch_size
        rows = torch.randint(len(latents), (size,), generator=draws)
        clean = latents[rows].float()
        timesteps = torch.randint(len(alphas_cumprod), (size,), generator=draws)
        epsilon = torch.randn(clean.shape, generator=draws)
        signal = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        prompts = tokens[rows % len(tokens)]
        dropped = torch.rand(size, generator=draws) < config.caption_dropout
        prompts = torch.where(dropped[:, None], empty, prompts)
        context = network["text_encoder"](prompts).last_hidden_state
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * epsilon
        return F.mse_loss(network["unet"](noisy, timesteps, context).sample, epsilon)

    return train_stage("unet", config.unet, network, loss, [draws], work)


def train_stage(
    name: str,
    stage: StageConfig,
    network: Any,
    loss: Callable[[], Tensor],
    generators: list[torch.Generator],
    work: Path,
) -> Any:
    """AdamW under a cosine schedule with a checkpoint every 250 steps; returns the averaged (EMA) copy."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=stage.learning_rate, weight_decay=1e-4)
    average = copy.deepcopy(network).requires_grad_(False)
    checkpoint, first = work / f"{name}.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(saved["network"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        for generator, state in zip(generators, saved["generators"], strict=True):
            generator.set_state(state)
        first = saved["step"]
    started, recent = time.monotonic(), []
    for step in range(first, stage.steps):
        warmup = min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * warmup * (0.01 + 0.99 * _cosine(step / stage.steps))
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.998, (step + 1) / (step + 10))
        for kept, new in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
            kept.lerp_(new, 1 - decay) if kept.is_floating_point() else kept.copy_(new)
        recent.append(float(value.detach()))
        if (step + 1) % 250 == 0 or step + 1 == stage.steps:
            eta = (time.monotonic() - started) / (step + 1 - first) * (stage.steps - step - 1) / 60
            print(f"{name} {step + 1}/{stage.steps} loss {np.mean(recent):.5f}, {eta:.0f} min left", flush=True)
            recent.clear()
            state = {"network": network.state_dict(), "average": average.state_dict(), "step": step + 1}
            state |= {"optimizer": optimizer.state_dict(), "generators": [g.get_state() for g in generators]}
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
    network.load_state_dict(average.state_dict())
    return network


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 pictures as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def write_folder(config: BaseModelConfig, parts: dict[str, Any], latents: Tensor) -> Path:
    """Write the Stable Diffusion folder in half precision, its latent statistics beside the weights."""
    output = Path(config.output)
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            part.half()
        part.save_pretrained(output / name)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    index |= {name: list(_library_and_class(part)) for name, part in parts.items()}
    (output / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    mean, deviation = latents.float().mean((0, 2, 3)), latents.float().std((0, 2, 3))
    statistics = {"mean": mean.tolist(), "std": deviation.tolist(), "images": len(latents)}
    (output / "latent_statistics.json").write_text(json.dumps(statistics, indent=2) + "\n")
    (output / "recipe.json").write_text(json.dumps(to_mapping(config), indent=2) + "\n")
    return output


def _library_and_class(part: Any) -> Iterator[str]:
    yield type(part).__module__.split(".")[0]
    yield type(part).__name__


def main(
    config: Path = typer.Option(..., help="YAML of BaseModelConfig"),
    overrides: list[str] = typer.Argument(None, help="key=value"),
) -> None:
    """Train the tiny base model; a stopped run goes on where it stopped."""
    recipe = load_config(BaseModelConfig, config, overrides or [])
    work = Path(recipe.work)
    work.mkdir(parents=True, exist_ok=True)
    pixels, captions = make_pictures(recipe, work)
    tokenizer = make_tokenizer(captions, recipe.text_tokens)
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    vae = train_vae(recipe, pixels, work)
    latents = encode_pictures(vae, pixels)
    vae.register_to_config(scaling_factor=1 / float(latents.float().std()))
    latents = latents.float() * vae.config["scaling_factor"]
    networks = train_unet(recipe, latents, tokens, tokenizer, work)
    parts = {"vae": vae, "unet": networks["unet"], "text_encoder": networks["text_encoder"]}
    parts |= {"tokenizer": tokenizer, "scheduler": make_scheduler()}
    print(f"wrote {write_folder(recipe, parts, latents)}")


if __name__ == "__main__":
    typer.run(main)
