"""A small conditional UNet on these latents: a base of everyday crops, and what it learns of radiographs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from ld_common.core.seeding import torch_generator
from ld_common.core.state import State
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.drift import LatentDrift
from ld_common.diffusion.loss import denoising_loss, training_noise, training_timesteps
from ld_common.diffusion.sampling import make_sampler, sample
from ld_simulations.benchmarks.real_latents.autoencoder import LATENT_CHANNELS

CONTEXT = 8
"""Width of the context: one row, one-hot of the kind of picture."""
WIDTHS = (64, 96)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
"""Stable Diffusion's: the last signal level is .068."""


@dataclass(frozen=True)
class LatentTraining:
    """How long and how a network is trained."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int


def new_network(latent_side: int) -> Denoiser:
    """An untrained network for latents `(32,latent_side,latent_side)`, 2 million parameters, and its schedule."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=latent_side,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            block_out_channels=WIDTHS,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            cross_attention_dim=CONTEXT,
            attention_head_dim=32,
            norm_num_groups=16,
        )
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    absent = cast(Any, None)  # the context is given as it is, without words
    return Denoiser(unet=unet.eval(), text_encoder=absent, tokenizer=absent, scheduler=scheduler)


def loaded_network(latent_side: int, state: State) -> Denoiser:
    """A network with these weights."""
    network = new_network(latent_side)
    network.unet.load_state_dict(state)
    return network


def contexts(kinds: Sequence[str], known: Sequence[str]) -> Tensor:
    """Context `(N,1,CONTEXT)` of pictures by their kind, which is one of the `known` ones."""
    return torch.eye(CONTEXT)[[known.index(kind) for kind in kinds]][:, None]


def train_network(
    network: Denoiser,
    latents: Tensor,
    context: Tensor,
    training: LatentTraining,
    drift: LatentDrift | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> float:
    """Train in place, by AdamW with a rate that falls to 0 along a line; returns the last tenth's mean loss.

    Args:
        network: of `new_network`.
        latents: normalised, `(N,32,h,w)`.
        context: `(N,1,CONTEXT)`.
        training: its seed decides batches, timesteps and noise.
        drift: one of formulation `centred` is subtracted from the latents.
        advance: called with 1 after each step.
    """
    random = torch_generator(training.seed, "real-latents-training")
    alphas, kind = network.scheduler.alphas_cumprod, network.scheduler.config["prediction_type"]
    learned = latents if drift is None else drift.training_latents(latents)
    optimizer = torch.optim.AdamW(network.unet.parameters(), training.learning_rate)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / training.steps)
    losses = []
    network.unet.train()
    for _ in range(training.steps):
        rows = torch.randint(len(latents), (training.batch_size,), generator=random)
        noise = training_noise(learned[rows].shape, 0.0, random)
        timesteps = training_timesteps(len(rows), len(alphas), 1.0, random)
        mixed = None if drift is None else drift.training_noise(noise, network.scheduler)
        condition = Condition(context[rows])
        loss = denoising_loss(network.unet, alphas, kind, learned[rows], condition, timesteps, noise, mixed)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.unet.parameters(), 1.0)
        optimizer.step()
        falling.step()
        losses.append(loss.item())
        advance(1)
    network.unet.eval()
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def draw_latents(
    network: Denoiser, context: Tensor, seed: int, steps: int, drift: LatentDrift | None = None, spacing: str = ""
) -> Tensor:
    """Normalised latents `(N,32,h,w)` by DDIM, one for each context; the same noise for the same seed."""
    noise = torch.randn((len(context), *network.latent_shape), generator=torch_generator(seed, "real-latents-samples"))
    return sample(network, context, noise, make_sampler(network.scheduler, "ddim", steps, spacing), drift, 16)
