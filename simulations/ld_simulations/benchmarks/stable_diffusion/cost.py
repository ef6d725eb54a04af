"""`ld-benchmark stable-diffusion-cost`: a Stable Diffusion UNet at full width with random weights, on this machine.

    ld-benchmark stable-diffusion-cost
    ld-benchmark stable-diffusion-cost network=stable-diffusion-xl adapters=[lora] resolutions=[128,256,384]
    ld-benchmark stable-diffusion-cost device=cuda precision=bfloat16 resolutions=[512] targets=[]

Time and memory do not depend on the weights' values. Each size is measured in a process of its own; targets are
extrapolated from the measured sizes (a + b·n + c·n² with n latent pixels: convolutions and attention) and marked so.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from rich.console import Console
from scipy.optimize import nnls

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.atomic_files import write_bytes
from ld_common.diffusion.base_model import Denoiser
from ld_simulations.benchmarks.harness import json_bytes
from ld_simulations.benchmarks.stable_diffusion.plan import SD_1, SD_XL, CostConfig

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
STABLE_DIFFUSION_XL: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
UNETS = {SD_1: STABLE_DIFFUSION_1_4, SD_XL: STABLE_DIFFUSION_XL}
TITLES = {SD_1: "Stable Diffusion 1.4", SD_XL: "Stable Diffusion XL"}
PIXELS_PER_LATENT, TOKENS = 8, 77
WARM, TIMED = 1, 3

NUMBERS = "stable_diffusion_cost.json"


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    network: str
    adapter: str
    resolution: int
    """Side of the images, in pixels."""
    batch: int
    device: str
    precision: str


def measure(case: Case) -> dict[str, Any]:
    """Seconds of a training step and of a network evaluation, and the peak memory in MB."""
    device, batch = case.device, case.batch
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=case.precision == "bfloat16")
    torch.manual_seed(0)
    latent_side = case.resolution // PIXELS_PER_LATENT
    config = UNETS[case.network]
    unet = UNet2DConditionModel(**config).requires_grad_(False).to(device)
    model = Denoiser(unet=unet, text_encoder=None, tokenizer=None, scheduler=None)  # type: ignore[arg-type]
    trainable = list(inject(model, read_adapter({"name": case.adapter}), 0).trainable.values())
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    latents = torch.randn(batch, 4, latent_side, latent_side, device=device)
    context = torch.randn(batch, TOKENS, config["cross_attention_dim"], device=device)
    pooled = {"text_embeds": torch.randn(batch, 1280, device=device), "time_ids": torch.zeros(batch, 6, device=device)}
    given = {"added_cond_kwargs": pooled} if case.network == SD_XL else {}
    timesteps = torch.randint(1000, (batch,), device=device)

    def step() -> None:
        with autocast():
            loss = F.mse_loss(unet(latents, timesteps, context, **given).sample.float(), latents)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def evaluation() -> None:
        with autocast():
            unet(latents, timesteps, context, **given)

    evaluation_seconds, step_seconds = _fastest(evaluation, device), _fastest(step, device)
    if device == "cuda":
        peak_mb = torch.cuda.max_memory_allocated() / 1e6
    else:
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {
        **asdict(case),
        "threads": torch.get_num_threads() if device == "cpu" else 0,
        "parameters": sum(value.numel() for value in trainable),
        "computed": False,
        "evaluation_seconds": evaluation_seconds,
        "step_seconds": step_seconds,
        "peak_mb": peak_mb,
    }


def _fastest(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of a few runs: other work on the machine only slows a run down."""
    seconds = []
    for _ in range(WARM + TIMED):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[WARM:])


def compute(measured: list[dict[str, Any]], resolution: int) -> dict[str, Any]:
    """The cost of a larger resolution, extrapolated from three or more measured ones of one adapter."""
    pixels = np.array([(row["resolution"] / PIXELS_PER_LATENT) ** 2 for row in measured])
    target = (resolution / PIXELS_PER_LATENT) ** 2
    row = {**measured[0], "resolution": resolution, "computed": True}
    for key in ("evaluation_seconds", "step_seconds", "peak_mb"):
        values = np.array([row[key] for row in measured])
        # no part of the cost falls with the size: least squares with coefficients of 0 or more
        weights, _ = nnls(np.stack([np.ones_like(pixels), pixels, pixels**2], 1), values)
        row[key] = float(weights @ [1.0, target, target**2])
    return row


def page(rows: list[dict[str, Any]]) -> str:
    """The numbers as a Markdown page."""
    lines = [
        "# Cost of Stable Diffusion",
        "",
        "Written by `make benchmark-stable-diffusion-cost`. The UNets (860 million parameters, XL 2.57 billion; "
        "float32) have random weights; a step has one image. Rows marked *extrapolated* were not run: they follow "
        "from measured rows above them by a quadratic in the number of latent pixels. Memory is that of the process or "
        "of the GPU. Times are the fastest of three; here the machine did other work beside, which makes them longer: "
        "take them as upper bounds. Read the row of your resolution and adapter to see whether a site's machine can "
        "train.",
        "",
        "| UNet | adapter | trainable, million | pixels | device | training step, s | evaluation, s | memory, GB | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        device = f"{row['device']}, {row['precision']}" + (f", {row['threads']} threads" if row["threads"] else "")
        numbers = f"{row['step_seconds']:.2f} | {row['evaluation_seconds']:.2f} | {row['peak_mb'] / 1e3:.1f}"
        mark = "*extrapolated*" if row["computed"] else "measured"
        trainable = row["parameters"] / 1e6
        what = f"{TITLES[row['network']]} | {row['adapter']} | {trainable:.1f} | {row['resolution']}"
        lines.append(f"| {what} | {device} | {numbers} | {mark} |")
    lines += [
        "",
        "A counterfactual with 50 steps and one fixed-point iteration takes about 250 evaluations of one image: 100 "
        "for the inversion, 50 for the reconstruction, 100 for the edit. `--device cuda --precision float16` of "
        "`ld-generate` halves the weights' memory. The VAE and the text encoder come on top, once for each scan.",
        "",
    ]
    return "\n".join(lines)


def run(config: CostConfig, only_report: bool, console: Console) -> list[Path]:
    """Measure, unless `only_report`, and write the page; returns the files."""
    file = Path(config.results) / NUMBERS
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    for adapter in [] if only_report else config.adapters:
        measured = []
        for resolution in config.resolutions:
            case = Case(config.network, adapter, resolution, config.batch, config.device, config.precision)
            # a process of its own, or the peak would be that of the largest before
            with (
                console.status(f"{adapter} at {resolution} pixels"),
                ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process,
            ):
                measured.append(process.submit(measure, case).result())
        extrapolated = [compute(measured, target) for target in config.targets if target not in config.resolutions]
        rows = [row for row in rows if _key(row) != _key(measured[0])] + measured + extrapolated
        rows.sort(key=lambda row: (row["network"], _key(row), row["resolution"]))
        write_bytes(file, json_bytes(rows))
    page_file = file.with_suffix(".md")
    write_bytes(page_file, page(rows).encode())
    return [file, page_file]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What rows of one measurement have in common."""
    return tuple(row[key] for key in ("network", "adapter", "device", "precision", "batch"))
