"""Writes the tiny base model's card: how it was made, how well it reconstructs, what it draws.

.venv/bin/python -m ld_simulations.tiny_base.card --held-out runs/demo/hospitals/held_out
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from ld_common.core.command import run_cli
from ld_common.core.config import load_config
from ld_common.core.seeding import numpy_generator, torch_generator
from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.diffusion.sampling import make_sampler, sample
from ld_common.imaging.modality import Modality
from ld_common.metrics.image import psnr
from ld_evaluate.truth import read_truths
from ld_simulations.tiny_base.generic_images import generic_picture

PICTURES = 256
SHOWN = 12
SAMPLE_STEPS = 50
PROMPTS = (
    "ellipse, size 90, brightness 80, dark hole 20, black ground",
    "ellipse, size 90, brightness 80, dark hole 80, black ground",
    "box, size 60, brightness 20, ground 70",
    "flower of 6, size 80, brightness 70, ground 10",
    "dead leaves, size 20, brightness 50, contrast 20",
    "dead leaves, size 90, brightness 50, contrast 20",
)

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@cli.command()
def write_card(
    base: Path = typer.Option(Path("simulations/tiny_base"), help="Folder of the base model."),
    held_out: Path = typer.Option(..., help="Folder of held-out demo patients."),
    modality: Path = typer.Option(Path("configs/modalities/brain_mri.yaml"), help="What those scans are."),
    note: str = typer.Option("", help="A sentence about how this base was made that the recipe does not say."),
) -> None:
    """Measure the base on fresh generic pictures and on the demo's scans, and write its card and picture."""
    model = load_base(str(base))
    recipe = json.loads((base / "recipe.json").read_text())
    rng = numpy_generator(recipe["seed"] + 1, "card")
    drawn = [generic_picture(rng, model.resolution) for _ in range(PICTURES)]
    generic = torch.from_numpy(np.stack([picture.pixels for picture in drawn]))[:, None]
    scans, _ = read_truths(held_out, load_config(Modality, modality), model.resolution)
    quality = {name: _reconstruction(model, images) for name, images in (("generic", generic), ("scans", scans))}
    _write_sheet(base / "sheet.png", model, generic, scans)
    (base / "README.md").write_text(_card(model, recipe, quality, len(scans), note))
    print(f"wrote {base / 'README.md'}: " + ", ".join(f"{name} {value:.2f} dB" for name, value in quality.items()))


def _reconstruction(model: BaseModel, images: Tensor) -> float:
    """Mean PSNR in dB of images `(N,1,S,S)` through the VAE."""
    parts = [psnr(model.decode(model.encode(chunk)), chunk) for chunk in images.split(32)]
    return float(torch.cat(parts).mean())


@torch.no_grad()
def _write_sheet(path: Path, model: BaseModel, generic: Tensor, scans: Tensor) -> None:
    """Rows: generic pictures, through the VAE; scans, through the VAE; samples of the base, two a prompt."""
    prompts = [prompt for prompt in PROMPTS for _ in range(SHOWN // len(PROMPTS))]
    noise = torch.randn((SHOWN, *model.latent_shape), generator=torch_generator(0, "card"))
    sampler = make_sampler(model.scheduler, steps=SAMPLE_STEPS)
    samples = model.decode(sample(model, model.embed(prompts), noise, sampler))
    rows = []
    for images in (generic[:SHOWN], scans[:SHOWN]):
        rows += [images, model.decode(model.encode(images))]
    sheet = torch.cat([torch.cat(list(row[:, 0]), 1) for row in (*rows, samples)])
    grey = ((sheet + 1) * 127.5).round().to(torch.uint8).numpy()
    Image.fromarray(grey).save(path, optimize=True)


def _card(model: BaseModel, recipe: dict[str, object], quality: dict[str, float], scans: int, note: str) -> str:
    networks = {"VAE": model.vae, "UNet": model.unet, "text encoder": model.text_encoder}
    sizes = ", ".join(
        f"{name} {sum(value.numel() for value in part.parameters()) / 1e6:.2f} M" for name, part in networks.items()
    )
    prompts = "\n".join(f"- {prompt}" for prompt in PROMPTS)
    config = "zero_snr_base.yaml" if recipe.get("zero_terminal_snr") else "base_model.yaml"
    return f"""# The tiny base model

A latent diffusion model in Stable Diffusion's own folder format, small enough to live in the repository and to be
fine-tuned on two processors: {model.resolution}x{model.resolution} grey pictures, latents
{"x".join(map(str, model.latent_shape))}, half precision. Parameters: {sizes}.

**What it has seen:** {recipe["pictures"]} generic procedural pictures with captions (dead leaves, 1/f textures,
gradients, mazes, warped shapes with holes), drawn by `tiny_base.generic_images`. Nothing medical: the shift from
these to a hospital's scans is real. {_schedule(model)}

**How it was made:** `.venv/bin/python -m ld_simulations.tiny_base.train --config configs/{config}`, seed
{recipe["seed"]}, on {recipe["device"]}; the whole recipe is in `recipe.json`.{" " + note if note else ""}

**Reconstruction by the frozen VAE, the ceiling of everything later** (PSNR for a range of 2):

| images | PSNR |
|---|---|
| {PICTURES} fresh generic pictures | {quality["generic"]:.2f} dB |
| {scans} held-out scans of the demo | {quality["scans"]:.2f} dB |

![generic pictures and scans, each above its reconstruction; samples of the base](sheet.png)

Rows: generic pictures; the same through the VAE; scans of the demo; the same through the VAE; samples of the base,
two for each of

{prompts}

This card: `.venv/bin/python -m ld_simulations.tiny_base.card --held-out runs/demo/hospitals/held_out`.
"""


def _schedule(model: BaseModel) -> str:
    if model.scheduler.config["rescale_betas_zero_snr"]:
        return "Its schedule ends without signal (zero terminal SNR, arXiv 2305.08891), with v-prediction."
    return "Noise schedule and prediction type are those of Stable Diffusion 1.4."


if __name__ == "__main__":
    run_cli(cli)
