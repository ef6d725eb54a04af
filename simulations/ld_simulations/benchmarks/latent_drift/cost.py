"""What Stable Diffusion 1.4 needs here: its UNet at full width with random weights, timed and weighed on this machine.

    make benchmark-cost     or, on a GPU:
    python -m ld_simulations.benchmarks.latent_drift.cost --device cuda --precision bfloat16 --sides 512

Time and memory do not depend on the weights' values. Each picture side that fits is measured in a process of its own;
larger ones are computed from those (a + b·n + c·n² with n latent pixels: convolutions and attention) and marked so.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import UNet2DConditionModel
from scipy.optimize import nnls

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.command import run_cli
from ld_common.diffusion.base_model import Denoiser

STABLE_DIFFUSION_1_4: dict[str, Any] = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
"""The UNet's config in the published folder."""
PIXELS_PER_LATENT, TOKENS = 8, 77
WARM, TIMED = 1, 3

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def measure(adapter: str, side: int, batch: int, device: str, precision: str) -> dict[str, Any]:
    """Seconds of a training step and of a network evaluation, and the peak memory in MB, at one size."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**STABLE_DIFFUSION_1_4).requires_grad_(False).to(device)
    model = Denoiser(unet=unet, text_encoder=None, tokenizer=None, scheduler=None)  # type: ignore[arg-type]
    learned = list(inject(model, read_adapter({"name": adapter}), 0).trainable.values())
    optimizer = torch.optim.AdamW(learned, lr=1e-4)
    latents = torch.randn(batch, 4, side // PIXELS_PER_LATENT, side // PIXELS_PER_LATENT, device=device)
    context = torch.randn(batch, TOKENS, 768, device=device)
    timesteps = torch.randint(1000, (batch,), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = F.mse_loss(unet(latents, timesteps, context).sample.float(), latents)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def evaluation() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            unet(latents, timesteps, context)

    found: dict[str, Any] = {"adapter": adapter, "side": side, "batch": batch, "device": device, "precision": precision}
    found["threads"] = torch.get_num_threads() if device == "cpu" else 0
    found |= {"parameters": sum(value.numel() for value in learned), "computed": False}
    found["evaluation_seconds"] = _timed(evaluation, device)
    found["step_seconds"] = _timed(step, device)
    if device == "cuda":
        found["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    else:
        found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return found


def _timed(work: Any, device: str) -> float:
    """The fastest of a few runs: other work on the machine only ever slows one down."""
    seconds = []
    for _ in range(WARM + TIMED):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[WARM:])


def compute(measured: list[dict[str, Any]], side: int) -> dict[str, Any]:
    """What a larger side would need, from three or more measured sides of one adapter."""
    pixels = np.array([(one["side"] / PIXELS_PER_LATENT) ** 2 for one in measured])
    wanted = (side / PIXELS_PER_LATENT) ** 2
    found = {**measured[0], "side": side, "computed": True}
    for key in ("evaluation_seconds", "step_seconds", "peak_mb"):
        values = np.array([one[key] for one in measured])
        # no part of the cost falls with the size: least squares with coefficients of 0 or more
        weights, _ = nnls(np.stack([np.ones_like(pixels), pixels, pixels**2], 1), values)
        found[key] = float(weights @ [1.0, wanted, wanted**2])
    return found


def page(rows: list[dict[str, Any]]) -> str:
    """The numbers as a Markdown page."""
    lines = [
        "# What Stable Diffusion 1.4 needs",
        "",
        "Its UNet (860 million parameters, float32 weights) with random weights, one picture a step. Written by",
        "`make benchmark-cost`; rows marked *computed* are extrapolated from the measured ones above them by a",
        "quadratic in the number of latent pixels, and were not run. Memory is the process's or the GPU's.",
        "",
        "| adapter | learned, million | pixels | on | a training step, s | one evaluation, s | memory, GB | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        where = f"{one['device']}, {one['precision']}" + (f", {one['threads']} threads" if one["threads"] else "")
        numbers = f"{one['step_seconds']:.2f} | {one['evaluation_seconds']:.2f} | {one['peak_mb'] / 1e3:.1f}"
        mark = "*computed*" if one["computed"] else "measured"
        learned = one["parameters"] / 1e6
        lines.append(f"| {one['adapter']} | {learned:.1f} | {one['side']} | {where} | {numbers} | {mark} |")
    lines += [
        "",
        "A counterfactual with 50 steps, one refinement and one question takes about 250 evaluations of one picture:",
        "100 for the inversion, 50 for the reconstruction, 100 for the answer. `ld-generate --device cuda --precision",
        "float16` halves the weights. The VAE and the text encoder come on top, once for each scan.",
        "",
    ]
    return "\n".join(lines)


@cli.command()
def main(
    out: Path = typer.Option(Path("docs/benchmarks/stable_diffusion_cost.json"), help="JSON file for the numbers."),
    text: Path = typer.Option(Path("docs/stable_diffusion.md"), help="Markdown page of all numbers."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    precision: str = typer.Option("float32", help="float32 or bfloat16."),
    adapters: str = typer.Option("lora,custom_diffusion,basic", help="Schemes that are measured."),
    sides: str = typer.Option("64,128,256", help="Picture sides that are measured, in pixels."),
    batch: int = typer.Option(1, help="PictureSet a step."),
    target: int = typer.Option(512, help="Side that is computed, unless it is measured."),
) -> None:
    """Measure training steps and evaluations of Stable Diffusion 1.4's UNet and add them to a file."""
    kept = json.loads(out.read_text()) if out.exists() else []
    for adapter in adapters.split(","):
        measured = []
        for side in map(int, sides.split(",")):
            # a process of its own, or the peak would be that of the largest before
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                measured.append(alone.submit(measure, adapter, side, batch, device, precision).result())
            print(measured[-1], flush=True)
        if target not in [one["side"] for one in measured]:
            measured.append(compute(measured, target))
            print(measured[-1], flush=True)
        kept = [one for one in kept if not _same(one, measured)] + measured
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(kept, indent=1) + "\n")
    text.write_text(page(kept))
    print(f"wrote {out}\nwrote {text}")


def _same(one: dict[str, Any], measured: list[dict[str, Any]]) -> bool:
    keys = ("adapter", "device", "precision", "batch")
    return any(all(one[key] == other[key] for key in keys) for other in measured)


if __name__ == "__main__":
    run_cli(cli)
