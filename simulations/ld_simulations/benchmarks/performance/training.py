"""Seconds of training steps against the loop of diffusers' own LoRA script, on the same latents and network.

Both sides have their latents encoded beforehand. diffusers' script embeds the prompts in each step, ours once; its
LoRA is the plain layer of peft. `accelerate`, which on one processor adds only overhead, is left out of its loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from torch import Tensor

from ld_common.adapters.base import inject
from ld_common.adapters.lora import Lora
from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.diffusion.options import TrainingConfig
from ld_common.diffusion.training import TrainingData, optimize
from ld_simulations.benchmarks.performance.interleaved import interleaved, ratio

SCANS = 64
RANK = 6
TARGETS = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "conv1", "conv2"]
"""The demo's."""
RATE = 1e-4


def measure_training(base_model: str, steps: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """Seconds of `steps` steps by each loop, and their ratio."""
    prompts = [f"brain MRI of a patient of {60 + number % 30} years" for number in range(SCANS)]
    generator = torch.Generator().manual_seed(0)
    ours, theirs = load_base(base_model), load_base(base_model)
    latents = torch.randn(SCANS, *ours.latent_shape, generator=generator)
    work = {
        "ours": _our_loop(ours, latents, prompts, steps, batch_size),
        "diffusers": _diffusers_loop(theirs, latents, prompts, steps, batch_size),
    }
    seconds = interleaved(work, repeats)
    return {
        "steps": steps,
        "batch_size": batch_size,
        "seconds": seconds,
        "training_over_diffusers_loop": ratio(seconds, "diffusers", "ours"),
        "gigaflops_a_step": _flops(ours, batch_size) / 1e9,
    }


def _our_loop(base: BaseModel, latents: Tensor, prompts: list[str], steps: int, batch_size: int) -> Callable[[], None]:
    adapted = inject(base, Lora(rank=RANK, targets=TARGETS), 0)
    data = TrainingData(latents, prompts)
    options = TrainingConfig(steps=steps, batch_size=batch_size, learning_rate=RATE)
    generator = torch.Generator().manual_seed(0)

    def run() -> None:
        optimize(adapted.model, adapted.trainable, data, options, lambda _: generator, lambda _: RATE)

    return run


def _diffusers_loop(
    base: BaseModel, latents: Tensor, prompts: list[str], steps: int, batch_size: int
) -> Callable[[], None]:
    """The steps of `train_text_to_image_lora.py` of diffusers, without its VAE."""
    from peft import LoraConfig

    unet, text_encoder, tokenizer = base.unet, base.text_encoder, base.tokenizer
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    scheduler = DDPMScheduler.from_config(base.scheduler.config)
    length = int(text_encoder.config.max_position_embeddings)
    tokens = tokenizer(prompts, max_length=length, padding="max_length", truncation=True, return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(0)

    def run() -> None:
        optimizer = torch.optim.AdamW(parameters, lr=RATE)
        rates = get_scheduler("constant", optimizer)
        unet.train()
        for _ in range(steps):
            rows = torch.randint(len(latents), (batch_size,), generator=generator)
            batch = latents[rows]
            noise = torch.randn_like(batch)
            timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch_size,)).long()
            noisy = scheduler.add_noise(batch, noise, timesteps)
            hidden = text_encoder(tokens[rows], return_dict=False)[0]
            kind = scheduler.config.prediction_type
            target = noise if kind == "epsilon" else scheduler.get_velocity(batch, noise, timesteps)
            predicted = unet(noisy, timesteps, hidden, return_dict=False)[0]
            loss = F.mse_loss(predicted.float(), target.float(), reduction="mean")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        unet.eval()

    return run


def _flops(base: BaseModel, batch_size: int) -> float:
    """Floating-point operations of one step: forward, and the gradient of activations and of the adapter."""
    from torch.utils.flop_counter import FlopCounterMode

    latents = torch.randn(batch_size, *base.latent_shape)
    context = base.embed([""]).detach().expand(batch_size, -1, -1)
    with FlopCounterMode(display=False) as counter:
        base.unet(latents, torch.tensor(500), context).sample.square().mean().backward()
    return float(counter.get_total_flops())
