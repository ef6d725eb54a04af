"""One site's local training: cached latents in, a changed adapter out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn

from ld_client.store import Store
from ld_common.errors import LdError
from ld_common.objective import denoising_loss, training_noise, training_timesteps
from ld_common.seeding import torch_generator
from ld_common.study import StudyConfig

WARMUP_STEPS = 5
FINAL_RATE = 0.05


class DivergedError(LdError):
    """Training gave a loss that is not finite."""

    code = "diverged"


@dataclass(frozen=True)
class Losses:
    """The loss of each step of a round."""

    values: list[float]

    @property
    def first(self) -> float:
        """Mean over the first fifth."""
        return float(np.mean(self.values[: math.ceil(len(self.values) / 5)]))

    @property
    def last(self) -> float:
        """Mean over the last fifth."""
        return float(np.mean(self.values[-math.ceil(len(self.values) / 5) :]))


def train_round(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    store: Store,
    study: StudyConfig,
    round_number: int,
    site: str,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Losses:
    """Train the parameters of `unet` that require a gradient for one round, in place.

    Every draw comes from the stream (study seed, site, round), so a round can be repeated alone.

    Raises:
        DivergedError: the loss is not finite.
    """
    training = study.training
    generator = torch_generator(study.seed, "train", site, round_number)
    learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=training.learning_rate, weight_decay=0.0)
    values: list[float] = []
    unet.train()
    for index in range(training.steps):
        rate = learning_rate(study, round_number, index)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(store.latents), (training.batch_size,), generator=generator)
        latents, context = store.latents[rows], store.embeddings[rows]
        dropped = torch.rand(training.batch_size, generator=generator) < training.prompt_dropout
        context = torch.where(dropped[:, None, None], store.empty_embedding, context)
        timesteps = training_timesteps(
            training.batch_size, len(scheduler.alphas_cumprod), training.timestep_power, generator
        )
        noise = training_noise(latents.shape, training.offset_noise, generator)
        loss = denoising_loss(
            unet, scheduler.alphas_cumprod, scheduler.config["prediction_type"], latents, context, timesteps, noise
        )
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        values.append(float(loss.detach()))
        if not math.isfinite(values[-1]):
            raise DivergedError(f"the loss of step {index + 1} is {values[-1]}: lower training.learning_rate")
        on_step(index + 1, values[-1])
    unet.eval()
    return Losses(values)


def learning_rate(study: StudyConfig, round_number: int, step: int) -> float:
    """Half a cosine over all rounds of the study, with a short warm-up in each for the fresh optimizer."""
    training = study.training
    progress = (round_number - 1 + step / training.steps) / study.federation.rounds
    cosine = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return training.learning_rate * cosine * min(1.0, (step + 1) / WARMUP_STEPS)
