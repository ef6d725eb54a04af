"""Training of an adapter in one call, without a study or a federation."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from ld_common.adapters.base import AdaptedModel, Adapter, inject
from ld_common.adapters.prior_preservation import draw_prior
from ld_common.core.config import checked
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.drift import ConditionalDrift, LatentDrift
from ld_common.diffusion.options import TrainingConfig
from ld_common.diffusion.training import TrainingData, optimize, scheduled_rate

M = TypeVar("M", bound=Denoiser)


def train(
    base: M,
    adapter: Adapter,
    data: TrainingData,
    drift: LatentDrift | ConditionalDrift | None = None,
    steps: int = 500,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    **options: Any,
) -> AdaptedModel[M]:
    """Train an adapter on a copy of a base; the base that is passed stays as it is.

    The copy has its own network, text encoders and tokenizers and shares the VAE and the scheduler with `base`.

    Args:
        base: from `load_base`, with float32 weights.
        adapter: for example `adapters.Lora(rank=8)`.
        data: for example from `TrainingData.from_table`.
        drift: latent drift of the data; `data.drift` if None. A conditional one only matters when sampling.
        steps: training steps.
        seed: of the adapter's initial values and of all random numbers in training.
        on_step: called with the number of each step, from 1, and its loss.
        options: other fields of `TrainingConfig`, such as `batch_size` and `learning_rate`.

    Raises:
        ConfigError: an unknown option or a value out of range.
        AdapterError: the adapter does not fit the base.
        DivergedError: the loss is not finite.
    """
    config = checked(TrainingConfig, {"steps": steps, **options}, "training.")
    parts = copy.deepcopy({name: getattr(base, name) for name in ("unet", "text_encoder", "tokenizer", "reader")})
    # the prior's images are the base's own, so they are drawn before the adapter changes it
    prior = data.prior if adapter.prior is None else draw_prior(base, adapter.prior, seed)
    entering = drift if isinstance(drift, LatentDrift) else data.drift
    adapted = inject(dataclasses.replace(base, **parts), adapter, seed)
    generator = torch_generator(seed, "train")
    optimize(
        adapted.model,
        adapted.trainable,
        dataclasses.replace(data, drift=entering, prior=prior),
        config,
        lambda step: generator,
        lambda step: scheduled_rate(config, step),
        on_step=on_step,
    )
    return dataclasses.replace(adapted, drift=entering)
