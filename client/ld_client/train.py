"""A study's local training of one round: the training loop with the study's options, seeds and learning rates."""

from __future__ import annotations

import functools
import hmac
from collections.abc import Callable
from typing import Any

import torch

from ld_client.site_config import SiteConfig
from ld_common.adapters.base import AdaptedModel
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.computing import Computing
from ld_common.diffusion.training import FLOAT32, Losses, LossSampler, TrainingData, optimize, scheduled_rate
from ld_common.protocol.study_config import StudyConfig


def train_round(
    adapted: AdaptedModel[Any],
    data: TrainingData,
    study: StudyConfig,
    round_number: int,
    site: str,
    arithmetic: Computing = FLOAT32,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    secret: bytes = b"",
) -> Losses:
    """Train an adapter's parameters for one round, in place.

    Args:
        adapted: the model with the adapter's parameters at the start of the round.
        data: the site's scans.
        study: its options.
        round_number: from 1.
        site: the site's name.
        arithmetic: how the network computes; the trained parameters stay float32.
        on_step: called with each step's number and loss.
        secret: as for `round_draws`.

    Raises:
        DivergedError: the loss is not finite.
    """
    draws, rate = round_draws(study, round_number, site, secret), functools.partial(learning_rate, study, round_number)
    return optimize(adapted.model, adapted.trainable, data, study.training, draws, rate, arithmetic, on_step)


def round_draws(study: StudyConfig, round_number: int, site: str, secret: bytes) -> Callable[[int], torch.Generator]:
    """The source of the random numbers of each step of a round, from 0.

    Every draw comes from a stream on the CPU, so a round can be repeated alone. Whoever knows the draws (rows,
    timesteps and noise) of a round can compute its update for any scan, and so test or reconstruct the site's own. At a
    site they follow from a secret of its own, from which each step is seeded anew: PyTorch's generator takes 32 bits of
    a seed, which could be found by trying.

    Args:
        study: its seed.
        round_number: from 1.
        site: the site's name.
        secret: a key that only the site knows; without one, as in a benchmark, the study's seed gives the draws.
    """
    generator = torch_generator(study.seed, "train", site, round_number)
    place = f"train/{study.digest()}/{site}/{round_number}"

    def draws(step: int) -> torch.Generator:
        if secret:
            seed = hmac.digest(secret, f"{place}/{step}".encode(), "sha256")[:8]
            generator.manual_seed(int.from_bytes(seed, "big"))
        return generator

    return draws


def computing(site: SiteConfig) -> Computing:
    """How a site's config has its networks compute."""
    return Computing(site.precision, site.compile, site.gradient_checkpointing)


def loss_sampler(
    adapted: AdaptedModel[Any], data: TrainingData, study: StudyConfig, generator: torch.Generator
) -> LossSampler:
    """The loss of an adapted model on a site's scans, by a study's options."""
    return LossSampler(adapted.model, adapted.trainable, data, study.training, generator)


def learning_rate(study: StudyConfig, round_number: int, step: int) -> float:
    """Learning rate of a step, from 0, of a round, from 1."""
    return scheduled_rate(study.training, step, study.federation.rounds, round_number)
