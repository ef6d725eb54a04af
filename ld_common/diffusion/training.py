"""The training loop: AdamW on an adapter's parameters, from encoded scans, in one process or several."""

from __future__ import annotations

import importlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ld_common.core.errors import LdError
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.computing import Computing
from ld_common.diffusion.conditioning import Condition, image_condition
from ld_common.diffusion.drift import LatentDrift, centre, shift_noise
from ld_common.diffusion.loss import (
    denoising_pair,
    min_snr_weights,
    training_noise,
    training_timesteps,
    weighted_loss,
)
from ld_common.diffusion.options import TrainingConfig
from ld_common.diffusion.ranks import ALONE, Ranks, SharedComputing

if TYPE_CHECKING:
    from pathlib import Path

    from ld_common.diffusion.base_model import BaseModel
    from ld_common.imaging.modality import Modality

WARMUP_STEPS = 5
FLOAT32 = Computing()
FINAL_RATE = 0.05
"""Learning rate at the end of training, as a share of the initial one."""


class DivergedError(LdError):
    """The training loss is not finite."""

    code = "diverged"


@dataclass(frozen=True)
class Losses:
    """The loss of each training step."""

    values: list[float]
    rows: frozenset[int] = frozenset()
    """Rows of all scans that were drawn."""

    @property
    def first(self) -> float:
        """Mean over the first fifth."""
        return float(np.mean(self.values[: math.ceil(len(self.values) / 5)]))

    @property
    def last(self) -> float:
        """Mean over the last fifth."""
        return float(np.mean(self.values[-math.ceil(len(self.values) / 5) :]))


@dataclass(frozen=True, eq=False)
class PriorImages:
    """Images of a class that the base drew itself, for prior preservation (arXiv 2208.12242)."""

    latents: Tensor
    """`(N,C,h,w)`."""
    context: Tensor
    """Embedding of the class prompt, `(T,D)`."""
    weight: float
    """Weight of their loss, relative to that of the scans."""


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Scans to train on, as latents with their prompts."""

    latents: Tensor
    """`(N,C,h,w)`, scaled."""
    prompts: list[str]
    """Prompt of each scan."""
    drift: LatentDrift | None = None
    """The latent drift of these scans."""
    prior: PriorImages | None = None
    """The base's own images, for adapters with prior preservation."""
    patients: list[str] = field(default_factory=list)
    """Patient of each scan, for differential privacy and for image-conditioned adapters."""
    condition_vectors: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    """`Modality.condition_vector` of each scan, `(N,k)`, for image-conditioned adapters."""

    @classmethod
    def from_table(cls, table: Path | str, *, modality: Modality | Path | str, base: BaseModel) -> TrainingData:
        """Read and encode the scans of a CSV table.

        Args:
            table: one row per scan, with columns `patient`, `input` (path of the scan, relative to the table) and every
                attribute of the modality.
            modality: a modality, or its YAML file.
            base: its VAE encodes the scans.

        Raises:
            RequestError: the table cannot be read, or a row lacks a value.
            ScanError: a scan cannot be used.
        """
        # by name: the code bundle, which is the import closure of the ClientApp, holds no reader of scans
        scan_table: Any = importlib.import_module("ld_common.imaging.scan_table")
        loaded: Modality = scan_table.load_modality(modality)
        scans = scan_table.read_scan_table(table, loaded, base.resolution)
        images = scans.images.split(16)
        return cls(
            latents=torch.cat([base.encode(chunk).float().cpu() for chunk in images]),
            prompts=[loaded.prompt(attributes) for attributes in scans.attributes],
            patients=scans.patients,
            condition_vectors=torch.tensor([loaded.condition_vector(attributes) for attributes in scans.attributes]),
        )


class LossSampler:
    """Draws batches of scans, timesteps and noise, and returns the network's loss on them."""

    def __init__(
        self,
        model: Denoiser,
        trainable: Mapping[str, nn.Parameter],
        data: TrainingData,
        options: TrainingConfig,
        generator: torch.Generator,
    ) -> None:
        """Embed the prompts once, unless their tokens train.

        Args:
            model: the base with the adapter in it.
            trainable: the adapter's trainable parameters, by name.
            data: the scans.
            options: batch size, noise offset, conditioning dropout, timestep power and weighting.
            generator: source of all random numbers, on the CPU.
        """
        self.model, self.data, self.options, self.generator = model, data, options, generator
        self.levels = model.scheduler.alphas_cumprod
        self.latents = centre(data.latents, data.drift).to(model.device)
        self.prompts = ["", *sorted(set(data.prompts))]
        numbers = {prompt: number for number, prompt in enumerate(self.prompts)}
        self.rows = torch.tensor([numbers[prompt] for prompt in data.prompts])
        tokens_train = any(name.startswith("text_encoder.") for name in trainable)
        self.contexts = None if tokens_train else model.embed(self.prompts)
        self.visits = _visits(data.patients) if model.image_conditioned else []
        self.drawn: set[int] = set()
        """Rows of the scans that were drawn so far."""
        self.share: Callable[[int], Tensor] = ALONE.share
        """Positions of the rows of a batch that are computed. A loss is that of these rows over the size of the batch,
        and without a gradient if there are none."""

    def loss(self) -> Tensor:
        """The mean loss of a random batch of scans, plus the weighted loss of a batch of prior images."""
        rows = torch.randint(len(self.latents), (self.options.batch_size,), generator=self.generator)
        self.drawn.update(rows.tolist())
        loss = self.scans_loss(rows)
        prior = self.prior_loss()
        return loss if prior is None else loss + prior

    def scans_loss(self, rows: Tensor, reduction: str = "mean") -> Tensor:
        """The loss of the scans of these rows `(B,)`: their mean, or their `sum`."""
        dropped = torch.rand(len(rows), generator=self.generator) < self.options.conditioning_dropout_prob
        share = self.share(len(rows))
        which = torch.where(dropped, 0, self.rows[rows])[share]
        latents = self.latents[rows[share].to(self.latents.device)]
        condition = Condition(self._context(which), self._baseline(rows, share))
        loss = self._loss(latents, condition, self.data.drift, len(rows))
        return loss * len(rows) if reduction == "sum" else loss

    def prior_loss(self) -> Tensor | None:
        """The weighted loss of a batch of prior images, which does not depend on the scans; None without a prior."""
        prior, size = self.data.prior, self.options.batch_size
        if prior is None:
            return None
        rows = torch.randint(len(prior.latents), (size,), generator=self.generator)
        rows = rows[self.share(size)]
        condition = Condition(prior.context.expand(len(rows), -1, -1))
        return prior.weight * self._loss(prior.latents[rows.to(prior.latents.device)], condition, None, size)

    def _loss(self, latents: Tensor, condition: Condition, drift: LatentDrift | None, size: int) -> Tensor:
        """The loss of the share of a batch of this size: its mean times its part of the batch."""
        model, share = self.model, self.share(size)
        shape = torch.Size((size, *latents.shape[1:]))
        timesteps = training_timesteps(size, len(self.levels), self.options.timestep_power, self.generator)[share]
        noise = training_noise(shape, self.options.noise_offset, self.generator)[share]
        if not len(share):
            return latents.new_zeros(())
        mixed = shift_noise(noise, drift, self.levels)
        prediction_type, device = model.scheduler.config["prediction_type"], latents.device
        parts = timesteps.to(device), noise.to(device), mixed.to(device)
        pair = denoising_pair(model.unet, self.levels, prediction_type, latents, condition, *parts)
        if not self.options.min_snr_gamma:
            return F.mse_loss(*pair) * (len(share) / size)
        signal = self.levels[timesteps].to(latents)
        weights = min_snr_weights(signal, self.options.min_snr_gamma, prediction_type)
        return weighted_loss(*pair, weights) * (len(share) / size)

    def _baseline(self, rows: Tensor, share: Tensor) -> Tensor | None:
        """`image_condition` of a random visit of the patient of each scan of a share of these rows, or zeros.

        None without image conditioning.
        """
        if not self.model.image_conditioned:
            return None
        picked = torch.rand(len(rows), generator=self.generator)[share]
        conditioned = torch.rand(len(rows), generator=self.generator) >= self.options.conditioning_dropout_prob
        rows, conditioned = rows[share], conditioned[share]
        visits = [self.visits[row] for row in rows.tolist()]
        chosen = [choices[int(share * len(choices))] for choices, share in zip(visits, picked.tolist(), strict=True)]
        changes = self.data.condition_vectors[rows] - self.data.condition_vectors[chosen]
        return image_condition(self.latents[chosen], changes) * conditioned.view(-1, 1, 1, 1).to(self.latents)

    def _context(self, which: Tensor) -> Tensor:
        if self.contexts is not None:
            return self.contexts[which.to(self.contexts.device)]
        if not len(which):
            return self.latents.new_zeros(0)
        used, positions = which.unique(return_inverse=True)
        return self.model.embed([self.prompts[row] for row in used])[positions.to(self.model.device)]


def optimize(
    model: Denoiser,
    trainable: Mapping[str, nn.Parameter],
    data: TrainingData,
    options: TrainingConfig,
    draws: Callable[[int], torch.Generator],
    learning_rate: Callable[[int], float],
    computing: Computing = FLOAT32,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Losses:
    """Train parameters for `options.steps` steps of AdamW, in place.

    Args:
        model: the base with the adapter in it.
        trainable: the parameters that train, by name.
        data: the scans.
        options: steps, batch size and noise.
        draws: source of the random numbers of each step, from step 0, on the CPU; equal ones give equal results on the
            same machine.
        learning_rate: learning rate of each step, from step 0.
        computing: how the network computes; the trained parameters stay float32. With `SharedComputing`, all processes
            end with the same parameters and losses, those of one process but for rounding.
        on_step: called with the number of each step, from 1, and its loss.

    Raises:
        DivergedError: the loss is not finite.
    """
    called = replace(model, unet=computing.network(model.unet))
    sampler, parameters = LossSampler(called, trainable, data, options, draws(0)), list(trainable.values())
    ranks = computing.ranks if isinstance(computing, SharedComputing) else ALONE
    sampler.share = ranks.share
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    anchors = [parameter.detach().clone() for parameter in parameters] if options.proximal_mu else []
    average, scaler = WeightAverage(parameters, options.ema), computing.scaler(model.device)
    values: list[float] = []
    model.unet.train()
    for index in range(options.steps):
        sampler.generator = draws(index)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(index)
        value = 0.0
        for _ in range(options.gradient_accumulation):
            with computing.on(model.device):
                loss = sampler.loss() / options.gradient_accumulation
            if loss.requires_grad:
                scaler.scale(loss).backward()
            value += float(loss.detach())
        value = _sum_gradients(parameters, value, ranks)
        scaler.unscale_(optimizer)
        for parameter, anchor in zip(parameters if anchors else (), anchors, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=options.proximal_mu)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        average.add()
        optimizer.zero_grad()
        values.append(value)
        if not math.isfinite(values[-1]):
            raise DivergedError(f"the loss of step {index + 1} is {values[-1]}: lower training.learning_rate")
        on_step(index + 1, values[-1])
    average.write()
    model.unet.eval()
    return Losses(values, frozenset(sampler.drawn))


def _sum_gradients(parameters: Sequence[nn.Parameter], loss: float, ranks: Ranks) -> float:
    """Sum each parameter's gradient over the processes, in place; returns the sum of their losses.

    A parameter without a gradient in every process keeps none.
    """
    if ranks.count == 1:
        return loss
    given = [float(parameter.grad is not None) for parameter in parameters]
    value, *counts = ranks.total(torch.tensor([loss, *given], dtype=torch.float64)).tolist()
    trained = [parameter for parameter, count in zip(parameters, counts, strict=True) if count]
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
    for parameter, gradient in zip(trained, ranks.sums(gradients), strict=True):
        parameter.grad = gradient
    return float(value)


def scheduled_rate(options: TrainingConfig, step: int, rounds: int = 1, round_number: int = 1) -> float:
    """Learning rate of a step: it falls over all rounds, with a short warm-up in each for the fresh optimizer.

    Args:
        options: `learning_rate` is the initial one, `lr_scheduler` how it falls, `steps` the steps of one round.
        step: step within the round, from 0.
        rounds: rounds of the whole training.
        round_number: from 1.
    """
    progress = (round_number - 1 + step / options.steps) / rounds
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, progress))), "linear": max(0.0, 1 - progress)}
    share = FINAL_RATE + (1 - FINAL_RATE) * left.get(options.lr_scheduler, 1.0)
    return options.learning_rate * share * min(1.0, (step + 1) / WARMUP_STEPS)


class WeightAverage:
    """Exponential moving average of parameters with a decay that grows in the first steps; decay 0 is none."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.steps = parameters, decay, 0
        self.values = [parameter.detach().clone() for parameter in parameters] if decay else []

    def add(self) -> None:
        """Add the parameters after a step."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        for value, parameter in zip(self.values, self.parameters if self.values else (), strict=True):
            value.lerp_(parameter.detach(), 1 - decay)

    def write(self) -> None:
        """Set the parameters to the average."""
        with torch.no_grad():
            for value, parameter in zip(self.values, self.parameters if self.values else (), strict=True):
                parameter.copy_(value)


def _visits(patients: Sequence[str]) -> list[list[int]]:
    """For each scan, the rows of all visits of its patient."""
    rows = defaultdict(list)
    for row, patient in enumerate(patients):
        rows[patient].append(row)
    return [rows[patient] for patient in patients]
