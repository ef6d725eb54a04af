"""Trains the tiny base model: a folder in Stable Diffusion's own format, from generic pictures alone.

Stages, each resumable and kept under `work`: pictures -> tokenizer -> VAE -> UNet with its text encoder -> folder.
The model card is written by `ld_simulations.tiny_base.card`, which may look at the demo's scans; nothing here may.

    python -m ld_simulations.tiny_base.train --config configs/base_model.yaml
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTokenizer

from ld_common.core.command import run_cli
from ld_common.core.config import load_config, to_mapping
from ld_common.core.seeding import derive_seed, numpy_generator, torch_generator
from ld_common.diffusion.base_model import load_base, load_denoiser
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.loss import denoising_loss
from ld_simulations.tiny_base.generic_images import generic_picture
from ld_simulations.tiny_base.networks import (
    BaseModelConfig,
    StageConfig,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
)

PICTURES_AT_ONCE = 1000
"""Pictures that one random stream draws."""
CHECKPOINT_STEPS = 500
EMA_DECAY = 0.999


def make_pictures(config: BaseModelConfig, work: Path) -> tuple[Tensor, list[str]]:
    """All pictures `(N, 1, H, W)`, uint8, and their captions; drawn once by all processors, then read back."""
    pixels_file, captions_file = work / "pictures.npy", work / "captions.json"
    if not captions_file.exists():
        draw = functools.partial(_draw_pictures, config.seed, config.side)
        starts = range(0, config.pictures, PICTURES_AT_ONCE)
        sizes = [min(PICTURES_AT_ONCE, config.pictures - start) for start in starts]
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            parts = list(pool.map(draw, starts, sizes))
        np.save(pixels_file, np.concatenate([pixels for pixels, _ in parts]))
        captions_file.write_text(json.dumps([caption for _, captions in parts for caption in captions]))
    return torch.from_numpy(np.load(pixels_file)), json.loads(captions_file.read_text())


def _draw_pictures(seed: int, side: int, start: int, count: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Pictures `(count, 1, side, side)` and captions, the same wherever and in whatever order they are drawn."""
    rng = numpy_generator(seed, "generic-pictures", start)
    pictures = [generic_picture(rng, side) for _ in range(count)]
    pixels = np.stack([np.round((picture.pixels[None] + 1) * 127.5) for picture in pictures]).astype(np.uint8)
    return pixels, [picture.caption for picture in pictures]


def train_vae(config: BaseModelConfig, pixels: Tensor, work: Path) -> AutoencoderKL:
    """Train the VAE on flipped and turned pictures: mean squared error and a little KL."""
    torch.manual_seed(derive_seed(config.seed, "vae-init"))
    vae = make_vae(config).to(config.device)
    draws = torch_generator(config.seed, "vae-batches")
    noise = torch_generator(config.seed, "vae-noise", device=config.device)

    def loss() -> Tensor:
        rows = torch.randint(len(pixels), (config.vae.batch_size,), generator=draws)
        turns, flip = torch.randint(4, (2,), generator=draws).tolist()
        images = torch.rot90(to_model_range(pixels[rows.to(pixels.device)]), turns, (2, 3))
        images = images.flip(3) if flip % 2 else images
        with torch.autocast(config.device, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            draw = torch.randn(posterior.mean.shape, generator=noise, device=config.device)
            restored = vae.decode(posterior.mean + posterior.std * draw).sample
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
    device = config.device
    network = nn.ModuleDict(_initial_networks(config, tokenizer)).to(device)
    scheduler = make_scheduler(config.zero_terminal_snr)
    alphas_cumprod, kind = scheduler.alphas_cumprod.to(device), scheduler.config["prediction_type"]
    draws = torch_generator(config.seed, "unet-batches", device=device)
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids.to(device)

    def loss() -> Tensor:
        size = config.unet.batch_size
        rows = torch.randint(len(latents), (size,), generator=draws, device=device)
        clean = latents[rows].float()
        timesteps = torch.randint(len(alphas_cumprod), (size,), generator=draws, device=device)
        epsilon = torch.randn(clean.shape, generator=draws, device=device)
        dropped = torch.rand(size, generator=draws, device=device) < config.caption_dropout
        prompts = torch.where(dropped[:, None], empty, tokens[rows % len(tokens)])
        with torch.autocast(device, torch.bfloat16):
            context = network["text_encoder"](prompts).last_hidden_state
            return denoising_loss(network["unet"], alphas_cumprod, kind, clean, Condition(context), timesteps, epsilon)

    train_stage("unet", config.unet, network, loss, [draws], work)
    return network


def _initial_networks(config: BaseModelConfig, tokenizer: CLIPTokenizer) -> dict[str, nn.Module]:
    if config.start:
        start = load_denoiser(config.start)
        return {"unet": start.unet.requires_grad_(True), "text_encoder": start.text_encoder.requires_grad_(True)}
    torch.manual_seed(derive_seed(config.seed, "unet-init"))
    return {"unet": make_unet(config), "text_encoder": make_text_encoder(config, tokenizer)}


def train_stage(
    name: str,
    stage: StageConfig,
    network: Any,
    loss: Callable[[], Tensor],
    generators: list[torch.Generator],
    work: Path,
) -> None:
    """AdamW under a cosine schedule with a checkpoint every 500 steps; leaves averaged weights in the network."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=stage.learning_rate, weight_decay=1e-4, fused=True)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    checkpoint, first = work / f"{name}.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(saved["network"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        for generator, state in zip(generators, saved["generators"], strict=True):
            generator.set_state(state.cpu())
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
        average.update_parameters(network)
        recent.append(value.detach())
        if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == stage.steps:
            mean = float(torch.stack(recent).mean())
            eta = (time.monotonic() - started) / (step + 1 - first) * (stage.steps - step - 1) / 60
            print(f"{name} {step + 1}/{stage.steps} loss {mean:.5f}, {eta:.1f} min left", flush=True)
            recent.clear()
            state = {"network": network.state_dict(), "average": average.state_dict(), "step": step + 1}
            state |= {"optimizer": optimizer.state_dict(), "generators": [g.get_state() for g in generators]}
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
    network.load_state_dict(average.module.state_dict())


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
            part.half().cpu()
        part.save_pretrained(output / name)
    # transformers loads in the precision that its config names; diffusers, which names none, in float32
    config_file = output / "text_encoder" / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
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
    pixels = pixels.to(recipe.device)
    start = load_base(recipe.start, recipe.device) if recipe.start else None
    tokenizer = make_tokenizer(captions, recipe.text_tokens) if start is None else start.tokenizer
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    tokens = tokens.to(recipe.device)
    vae = train_vae(recipe, pixels, work) if start is None else start.vae
    latents = encode_pictures(vae, pixels)
    if start is None:
        vae.register_to_config(scaling_factor=1 / float(latents.float().std()))
    latents *= vae.config["scaling_factor"]
    networks = train_unet(recipe, latents, tokens, tokenizer, work)
    parts = {"vae": vae, "unet": networks["unet"], "text_encoder": networks["text_encoder"]}
    parts |= {"tokenizer": tokenizer, "scheduler": make_scheduler(recipe.zero_terminal_snr)}
    print(f"wrote {write_folder(recipe, parts, latents)}")


if __name__ == "__main__":
    run_cli(cli)
