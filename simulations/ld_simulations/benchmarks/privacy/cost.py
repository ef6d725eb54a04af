"""Time of a private training step against a plain one of the same batch."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ld_client.privacy.dp_sgd import train_round_privately
from ld_client.train import train_round
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.diffusion.base_model import load_denoiser
from ld_common.diffusion.training import TrainingData
from ld_simulations.benchmarks.privacy.plan import PrivacyBenchmark, PrivacySetting

BATCH, DRAWS, STEPS, TURNS = 16, 1, 6, 15
WARM = 1
"""Untimed first steps of a turn."""


def step_ratio(benchmark: PrivacyBenchmark) -> dict[str, Any]:
    """Median over paired turns of a private step's time over a plain step's, with the same model and batch.

    Both run on one thread: several would wait for each other on a busy machine.
    """
    torch.set_num_threads(1)
    setting = PrivacySetting(
        patients=BATCH, expected_batch_size=BATCH, augmentation_multiplicity=DRAWS, steps=STEPS, warm_start=False
    )
    private = benchmark.study_of(setting, 0)
    training = replace(private.training, batch_size=BATCH * DRAWS)
    plain = replace(private, training=training, privacy=replace(private.privacy, enabled=False))
    model = load_denoiser(benchmark.study.base_model, benchmark.config.device)
    adapted = inject(model, read_adapter(private.adapter), 0)
    latents = torch.randn((BATCH, *model.latent_shape), generator=torch.Generator().manual_seed(0))
    data = TrainingData(latents, ["scan"] * BATCH, patients=[str(number) for number in range(BATCH)])

    def timed(train: Callable[[Callable[..., None]], object]) -> float:
        moments: list[float] = []

        def note(*_: object) -> None:
            if benchmark.config.device == "cuda":
                torch.cuda.synchronize()
            moments.append(time.perf_counter())

        train(note)
        gaps = [after - before for before, after in itertools.pairwise(moments)]
        return statistics.median(gaps[WARM:])

    ratios, seconds = [], []
    for _ in range(TURNS):
        without = timed(lambda note: train_round(adapted, data, plain, 1, "cost", on_step=note))
        with_it = timed(lambda note: train_round_privately(adapted, data, private, 1, 1.0, note))
        ratios.append(with_it / without)
        seconds.append((without, with_it))
    return {
        "dp_step_ratio": statistics.median(ratios),
        "dp_step_ratio_range": [min(ratios), max(ratios)],
        "plain_step_seconds": statistics.median(plain for plain, _ in seconds),
        "batch": BATCH,
        "device": benchmark.config.device,
    }
