"""A study's local training of one round: the training loop with the study's options, seeds and learning rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ld_common.adapters.base import AdaptedModel
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.training import Losses, LossSampler, TrainingData, optimize, scheduled_rate
from ld_common.protocol.study_config import StudyConfig


def train_round(
    adapted: AdaptedModel[Any],
    data: TrainingData,
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
        data: the site's scans.
        study: its options.
        round_number: from 1.
        site: the site's name.
        precision: `bfloat16` runs the network so; the trained parameters stay float32.
        on_step: called with each step's number and loss.

    Raises:
        DivergedError: the loss is not finite.
    """
    generator = torch_generator(study.seed, "train", site, round_number)

    def rate(step: int) -> float:
        return learning_rate(study, round_number, step)

    return optimize(adapted.model, adapted.trainable, data, study.training, generator, rate, precision, on_step)


def loss_sampler(
    adapted: AdaptedModel[Any], data: TrainingData, study: StudyConfig, generator: torch.Generator
) -> LossSampler:
    """The loss of an adapted model on a site's scans, by a study's options."""
    return LossSampler(adapted.model, adapted.trainable, data, study.training, generator)


def learning_rate(study: StudyConfig, round_number: int, step: int) -> float:
    """Learning rate of a step, from 0, of a round, from 1."""
    return scheduled_rate(study.training, step, study.federation.rounds, round_number)
