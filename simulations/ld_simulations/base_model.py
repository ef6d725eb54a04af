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
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ld_common.command import run_cli
from ld_common.config import load_config, to_mapping
from ld_common.seeding import derive_seed, numpy_generator, torch_generator
from ld_simulations.base_networks import (
    BaseModelConfig,
    StageConfig,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
)
from ld_simulations.generic_pictures import generic_picture


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


cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@cli.command()
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
    run_cli(cli)
