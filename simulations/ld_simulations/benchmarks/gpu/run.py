"""`ld-benchmark gpu`: one script that checks on a GPU what tests check on processors, and measures what they cannot.

    exactness    every base of small width: samples, null edits and training on the GPU against those on the processor
    training     seconds and memory of a LoRA step of Stable Diffusion 1.5's UNet in each arithmetic
    diffusers    the same step by the loop of diffusers' own script, and the share of the GPU's peak
    private      a step of DP-SGD
    several      one adapter that all GPUs train together, against that of one process

A part that fails is a sentence in the file. About ten minutes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_client.privacy.dp_sgd import train_round_privately
from ld_common.adapters.base import inject
from ld_common.adapters.lora import Lora
from ld_common.core.atomic_files import write_bytes
from ld_common.core.config import from_mapping
from ld_common.core.errors import ConfigError, LdError
from ld_common.diffusion.base_model import Denoiser, load_base, load_denoiser
from ld_common.diffusion.computing import Computing
from ld_common.diffusion.options import TrainingConfig
from ld_common.diffusion.sampling import make_sampler, sample
from ld_common.diffusion.training import TrainingData, optimize
from ld_common.protocol.study_config import StudyConfig
from ld_simulations.benchmarks.bases.suite import KINDS, null_edit_error
from ld_simulations.benchmarks.bases.together import together_difference
from ld_simulations.benchmarks.bases.unet_folders import SMALL
from ld_simulations.benchmarks.gpu.plan import GpuConfig
from ld_simulations.benchmarks.harness import json_bytes
from ld_simulations.benchmarks.performance.interleaved import interleaved, ratio
from ld_simulations.benchmarks.stable_diffusion.cost import STABLE_DIFFUSION_1_4
from ld_simulations.tiny_base.networks import make_scheduler

NUMBERS = "gpu.json"
TOKENS, RANK, RATE, SCANS = 77, 8, 1e-4, 32
ARITHMETICS = {
    "float32": Computing(),
    "bfloat16": Computing("bfloat16"),
    "float16": Computing("float16"),
    "bfloat16, checkpointing": Computing("bfloat16", checkpointing=True),
    "bfloat16, compiled": Computing("bfloat16", compiled=True),
}
PROMPTS = ["axial T1 brain MRI, woman", "axial T1 brain MRI"]
MATRIX, PRODUCTS = 8192, 20
"""Side and number of the matrix products whose speed counts as the peak."""


class SilentDenoiser(Denoiser):
    """A denoiser whose prompts are random numbers, the same for all."""

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """The same random embeddings `(1,77,D)` for each of B prompts, `(B,77,D)`."""
        width = int(self.unet.config["cross_attention_dim"])
        context = torch.randn(1, TOKENS, width, generator=torch.Generator().manual_seed(0))
        return context.to(self.device).expand(len(prompts), -1, -1)


def run(config: GpuConfig, only_report: bool, console: Console) -> list[Path]:
    """Measure and write the numbers, unless `only_report`; returns the file.

    Raises:
        ConfigError: no GPU on this machine.
    """
    file = Path(config.results) / NUMBERS
    if only_report:
        return [file]
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', and this machine has no GPU: run it on one that has")
    parts: dict[str, Callable[[GpuConfig], Any]] = {
        "exactness": _exactness,
        "training": _training,
        "diffusers": _diffusers,
        "private": _private,
        "several": _several,
    }
    found: dict[str, Any] = {"machine": _machine(config), "config": vars(config)}
    for name, measure in parts.items():
        started = time.monotonic()
        with console.status(name):
            try:
                result = measure(config)
            except (LdError, RuntimeError) as error:  # also torch.OutOfMemoryError
                result = {"failed": " ".join(str(error).split())}
        found[name] = result | {"seconds": round(time.monotonic() - started, 1)}
        write_bytes(file, json_bytes(found))
        console.print(name, "failed" if "failed" in result else "done")
    return [file]


def _machine(config: GpuConfig) -> dict[str, Any]:
    if config.device == "cpu":
        return {"device": "cpu", "torch": torch.__version__}
    facts = torch.cuda.get_device_properties(0)
    return {
        "device": facts.name,
        "count": torch.cuda.device_count(),
        "memory_gb": facts.total_memory / 1e9,
        "torch": torch.__version__,
    }


def _exactness(config: GpuConfig) -> dict[str, Any]:
    """Of every base: largest differences of six-step samples and of a trained LoRA, and of null edits on the device."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for number, kind in enumerate(KINDS):
            folder = str(kind.write(Path(place) / str(number)))
            here, there = _drawn(folder, "cpu"), _drawn(folder, config.device)
            base = load_base(folder, config.device)
            one, other = (_learned(load_denoiser(folder, device)) for device in ("cpu", config.device))
            rows.append(
                {
                    "base": kind.title,
                    "sample_difference": float((here - there).abs().max()),
                    "adapter_difference": max(float((one[key] - other[key]).abs().max()) for key in one),
                    "null_edit_max_error": max(null_edit_error(base, name) for name in ("belm", "ddpm", "flowedit")),
                }
            )
    return {"bases": rows}


def _drawn(folder: str, device: str) -> Tensor:
    base = load_base(folder, device)
    noise = torch.randn(2, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return sample(base, base.embed(PROMPTS), noise, make_sampler(base.scheduler, "ddim", 6)).cpu()


def _learned(model: Denoiser) -> dict[str, Tensor]:
    adapted = inject(model, Lora(rank=2), 0)
    options = TrainingConfig(steps=2, batch_size=2)
    _optimize(adapted.model, adapted.trainable, options, Computing())
    return adapted.trainable_state()


def _training(config: GpuConfig) -> dict[str, Any]:
    """Seconds a step and peak memory of each arithmetic, and how far its loss is from that of float32."""
    rows: dict[str, dict[str, Any]] = {}
    for name, computing in ARITHMETICS.items():
        adapted = inject(_network(config), Lora(rank=RANK), 0)
        options = TrainingConfig(steps=config.steps, batch_size=config.batch_size)
        step = partial(_optimize, adapted.model, adapted.trainable, options, computing)
        if config.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        losses = step()  # compiles
        seconds = interleaved({"step": partial(_timed, step, config.device)}, config.repeats)["step"]
        peak = torch.cuda.max_memory_allocated() / 1e6 if config.device == "cuda" else None
        rows[name] = {"step_seconds": min(seconds) / config.steps, "peak_mb": peak, "first_loss": losses[0]}
        del adapted
    exact = rows["float32"]["first_loss"]
    return {"rows": {name: row | {"loss_difference": abs(row["first_loss"] / exact - 1)} for name, row in rows.items()}}


def _diffusers(config: GpuConfig) -> dict[str, Any]:
    """Our step against that of diffusers' script, both under bfloat16 autocast, and the share of the GPU's peak."""
    ours, theirs = inject(_network(config), Lora(rank=RANK), 0), inject(_network(config), Lora(rank=RANK), 0)
    options = TrainingConfig(steps=config.steps, batch_size=config.batch_size)
    work: dict[str, Callable[[], object]] = {
        "ours": partial(_optimize, ours.model, ours.trainable, options, Computing("bfloat16")),
        "diffusers": partial(_plain_loop, theirs.model, list(theirs.trainable.values()), options),
    }
    timed = {name: partial(_timed, step, config.device) for name, step in work.items()}
    seconds = interleaved(timed, config.repeats)
    flops = _flops(ours.model, config.batch_size) * config.steps
    return {
        "training_over_diffusers_loop": ratio(seconds, "diffusers", "ours"),
        "share_of_bf16_peak": flops / min(seconds["ours"]) / _peak(config.device, config.full_size),
        "step_seconds": min(seconds["ours"]) / config.steps,
    }


def _private(config: GpuConfig) -> dict[str, Any]:
    """Seconds of a step of DP-SGD on a base of small width, with 4 patients of 4 draws."""
    with tempfile.TemporaryDirectory() as place:
        folder = KINDS[0].write(Path(place) / "base")
        study = from_mapping(
            StudyConfig,
            {
                "adapter": {"name": "lora", "rank": 2},
                "drift": {"shape": "none"},
                "training": {"steps": config.steps},
                "federation": {"weighting": "equal"},
                "privacy": {"enabled": True, "patients": 8, "expected_batch_size": 4, "target_delta": 0.01},
            },
        )
        adapted = inject(load_denoiser(str(folder), config.device), Lora(rank=2, freeze_a=True), 0)
        latents = torch.randn(8, *adapted.model.latent_shape, generator=torch.Generator().manual_seed(1))
        data = TrainingData(latents, ["a scan"] * 8, patients=list("abcdefgh"))
        started = time.perf_counter()
        train_round_privately(adapted, data, study, 1, 1.0)
        _wait(config.device)
        return {"step_seconds": (time.perf_counter() - started) / config.steps}


def _several(config: GpuConfig) -> dict[str, Any]:
    """Largest difference of an adapter that all GPUs train together, by what `--launcher accelerate` runs."""
    count = torch.cuda.device_count() if config.device == "cuda" else 2
    if count < 2:
        return {"processes": count, "note": "one GPU: several were not tried"}
    with tempfile.TemporaryDirectory() as place:
        folder = KINDS[0].write(Path(place) / "base")
        return {"processes": count, "adapter_difference": together_difference(folder, count, config.device)}


def _network(config: GpuConfig) -> Denoiser:
    """Stable Diffusion 1.5's UNet with random weights on the device."""
    torch.manual_seed(0)
    sizes = STABLE_DIFFUSION_1_4 if config.full_size else {**STABLE_DIFFUSION_1_4, **SMALL}
    with torch.device(config.device):
        unet = UNet2DConditionModel(**sizes).requires_grad_(False).eval()
    nothing: Any = None
    return SilentDenoiser(unet=unet, text_encoder=nothing, tokenizer=nothing, scheduler=make_scheduler())


def _optimize(model: Denoiser, trainable: Any, options: TrainingConfig, computing: Computing) -> list[float]:
    """Train on random latents; returns the losses."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(SCANS, *model.latent_shape, generator=generator)
    data = TrainingData(latents, ["a scan"] * SCANS)
    draws = torch.Generator().manual_seed(2)
    return optimize(model, trainable, data, options, lambda _: draws, lambda _: RATE, computing).values


def _plain_loop(model: Denoiser, parameters: list[Tensor], options: TrainingConfig) -> None:
    """The steps of diffusers' `train_text_to_image_lora.py` under bfloat16 autocast, from cached latents."""
    optimizer, device = torch.optim.AdamW(parameters, lr=RATE), model.device
    draws = torch.Generator(device).manual_seed(2)
    latents = torch.randn(SCANS, *model.latent_shape, generator=draws, device=device)
    context = model.embed(["a scan"]).expand(options.batch_size, -1, -1)
    levels = model.scheduler.alphas_cumprod.to(device)
    model.unet.train()
    for _ in range(options.steps):
        batch = latents[torch.randint(SCANS, (options.batch_size,), generator=draws, device=device)]
        noise = torch.randn(batch.shape, generator=draws, device=device)
        timesteps = torch.randint(len(levels), (options.batch_size,), generator=draws, device=device)
        signal = levels[timesteps].view(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = model.unet(signal.sqrt() * batch + (1 - signal).sqrt() * noise, timesteps, context).sample
            loss = F.mse_loss(predicted.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _flops(model: Denoiser, batch_size: int) -> float:
    """Floating-point operations of one step: forward, and the gradient of activations and of the adapter."""
    latents = torch.randn(batch_size, *model.latent_shape, device=model.device)
    with FlopCounterMode(display=False) as counter:
        context = model.embed(["a scan"]).expand(batch_size, -1, -1)
        model.unet(latents, torch.tensor(500, device=model.device), context).sample.square().mean().backward()
    return float(counter.get_total_flops())


def _peak(device: str, full_size: bool) -> float:
    """Floating-point operations a second of products of large bfloat16 matrices, measured."""
    side = MATRIX if full_size else MATRIX // 32
    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(PRODUCTS):
            one @ other
        _wait(device)
        best = max(best, PRODUCTS * 2 * side**3 / (time.perf_counter() - started))
    return best


def _timed(work: Callable[[], object], device: str) -> None:
    work()
    _wait(device)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
