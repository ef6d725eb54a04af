"""One site's local training: cached latents in, a changed adapter out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ld_common.adapters.base import AdaptedModel
from ld_common.adapters.prior_preservation import PriorExamples
from ld_common.core.errors import LdError
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.conditioning import Condition, image_condition
from ld_common.diffusion.drift import Drift, centre, shift_noise
from ld_common.diffusion.loss import denoising_loss, training_noise, training_timesteps
from ld_common.protocol.study_config import StudyConfig

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


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What one site trains on in a round."""

    latents: Tensor
    """`(N,C,h,w)`, scaled."""
    prompts: list[str]
    """What each shows."""
    drift: Drift | None = None
    """The site's own."""
    prior: PriorExamples | None = None
    """The base's own pictures, where the adapter preserves its prior."""
    patients: list[str] = field(default_factory=list)
    """Whose each is: what differential privacy and adapters that see a baseline go by."""
    condition_vectors: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    """`Modality.condition_vector` of each, `(N,k)`; an adapter that sees a baseline tells what differs from it."""


def train_round(
    adapted: AdaptedModel[Any],
    lesson: TrainingData,
    study: StudyConfig,
    round_number: int,
    site: str,
    precision: str = "float32",
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Losses:
    """Train an adapter's parameters for one round, in place.

    Every draw comes from the stream (study seed, site, round) on the CPU, so a round can be repeated alone.

    Args:
        adapted: the model with the adapter's parameters at the start of the round.
        lesson: what it learns from.
        study: how.
        round_number: counted from 1.
        site: the site's name.
        precision: `bfloat16` computes the network so; the weights that learn stay float32.
        on_step: called with each step's number and loss.

    Raises:
        DivergedError: the loss is not finite.
    """
    training, model = study.training, adapted.model
    examples = LossSampler(adapted, lesson, study, torch_generator(study.seed, "train", site, round_number))
    learned = list(adapted.trainable.values())
    optimizer = torch.optim.AdamW(learned, lr=training.learning_rate, weight_decay=0.0)
    values: list[float] = []
    model.unet.train()
    for index in range(training.steps):
        rate = learning_rate(study, round_number, index)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = examples.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        values.append(float(loss.detach()))
        if not math.isfinite(values[-1]):
            raise DivergedError(f"the loss of step {index + 1} is {values[-1]}: lower training.learning_rate")
        on_step(index + 1, values[-1])
    model.unet.eval()
    return Losses(values)


class LossSampler:
    """Draws noisy examples of a lesson's scans and says how wrong the network is about them."""

    def __init__(
        self, adapted: AdaptedModel[Any], lesson: TrainingData, study: StudyConfig, generator: torch.Generator
    ) -> None:
        self.model, self.lesson, self.training, self.generator = adapted.model, lesson, study.training, generator
        self.levels = self.model.scheduler.alphas_cumprod
        self.latents = centre(lesson.latents, lesson.drift).to(self.model.device)
        known = ["", *sorted(set(lesson.prompts))]
        self.known, self.rows = known, torch.tensor([known.index(prompt) for prompt in lesson.prompts])
        # words that learn are read anew at each step, frozen ones once
        learns_words = any(name.startswith("text_encoder.") for name in adapted.trainable)
        self.contexts = None if learns_words else self.model.embed(known)
        self.visits = _visits(lesson.patients) if self.model.image_conditioned else []

    def loss(self) -> Tensor:
        """The loss of a new batch, with that of a batch of the preserved prior."""
        rows = torch.randint(len(self.latents), (self.training.batch_size,), generator=self.generator)
        loss = self.scans_loss(rows)
        prior = self.prior_loss()
        return loss if prior is None else loss + prior

    def scans_loss(self, rows: Tensor, reduction: str = "mean") -> Tensor:
        """The loss of the scans of these numbers `(B,)`, or the sum of theirs."""
        dropped = torch.rand(len(rows), generator=self.generator) < self.training.conditioning_dropout_prob
        which = torch.where(dropped, 0, self.rows[rows])
        latents = self.latents[rows.to(self.latents.device)]
        condition = Condition(self._context(which), self._baseline(rows))
        return self._loss(latents, condition, self.lesson.drift, reduction)

    def prior_loss(self) -> Tensor | None:
        """The weighted loss of a batch of the preserved prior, which holds nothing of the scans, or None."""
        prior, size = self.lesson.prior, self.training.batch_size
        if prior is None:
            return None
        rows = torch.randint(len(prior.latents), (size,), generator=self.generator)
        condition = Condition(prior.context.expand(size, -1, -1))
        return prior.weight * self._loss(prior.latents[rows.to(prior.latents.device)], condition, None)

    def _loss(self, latents: Tensor, condition: Condition, drift: Drift | None, reduction: str = "mean") -> Tensor:
        count, model = len(latents), self.model
        timesteps = training_timesteps(count, len(self.levels), self.training.timestep_power, self.generator)
        noise = training_noise(latents.shape, self.training.noise_offset, self.generator)
        mixed = shift_noise(noise, drift, self.levels)
        kind, device = model.scheduler.config["prediction_type"], latents.device
        parts = timesteps.to(device), noise.to(device), mixed.to(device)
        return denoising_loss(model.unet, self.levels, kind, latents, condition, *parts, reduction)

    def _baseline(self, rows: Tensor) -> Tensor | None:
        """For each visit a random visit of its patient by `image_condition`, sometimes zeros; None without conditioning."""
        if not self.model.image_conditioned:
            return None
        picked = torch.rand(len(rows), generator=self.generator)
        kept = torch.rand(len(rows), generator=self.generator) >= self.training.conditioning_dropout_prob
        own = [self.visits[row] for row in rows.tolist()]
        chosen = [visits[int(share * len(visits))] for visits, share in zip(own, picked.tolist(), strict=True)]
        changes = self.lesson.condition_vectors[rows] - self.lesson.condition_vectors[chosen]
        return image_condition(self.latents[chosen], changes) * kept.view(-1, 1, 1, 1).to(self.latents)

    def _context(self, which: Tensor) -> Tensor:
        if self.contexts is not None:
            return self.contexts[which.to(self.contexts.device)]
        used, places = which.unique(return_inverse=True)
        return self.model.embed([self.known[row] for row in used])[places.to(self.model.device)]


def _visits(patients: Sequence[str]) -> list[list[int]]:
    """For each visit the rows of all visits of its patient."""
    rows = defaultdict(list)
    for row, patient in enumerate(patients):
        rows[patient].append(row)
    return [rows[patient] for patient in patients]


def learning_rate(study: StudyConfig, round_number: int, step: int) -> float:
    """Half a cosine over all rounds of the study, with a short warm-up in each for the fresh optimizer."""
    training = study.training
    progress = (round_number - 1 + step / training.steps) / study.federation.rounds
    cosine = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return training.learning_rate * cosine * min(1.0, (step + 1) / WARMUP_STEPS)
