"""The paper's search for a scalar drift δ, in units of the shift of z_T (arXiv 2412.20651).

From a grid of δ it takes the one whose samples are nearest to the site's images in L1, by Monte Carlo. E|x - y| alone
is least where all samples are the median image, so the energy distance 2 E|x - y| - E|x - x'| - E|y - y'| is minimised;
the plain term is reported beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ld_common.core.config import require
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.drift import LatentDrift, drift_from_shift
from ld_common.diffusion.options import SearchConfig
from ld_common.diffusion.sampling import make_sampler, sample


@dataclass(frozen=True)
class Trial:
    """What one δ gave; `parts` are the terms of the loss by name."""

    delta: float
    loss: float
    parts: dict[str, float]


Progress = Callable[[int, int], None]


def best(trials: Sequence[Trial]) -> Trial:
    """The trial of least loss, the one nearest to no drift of equals."""
    return min(trials, key=lambda trial: (trial.loss, abs(trial.delta)))


def search_grid(
    model: Denoiser,
    latents: Tensor,
    prompts: Sequence[str],
    config: SearchConfig,
    formulation: str,
    seed: int,
    progress: Progress = lambda done, total: None,
) -> list[Trial]:
    """Try each δ: samples of the images' own prompts against the images, all from the same noise.

    Args:
        model: the base, or the base with an adapter.
        latents: scaled latents `(N,C,h,w)` of real images.
        prompts: what each shows.
        config: which δ, how many images and steps.
        formulation: how the drift enters.
        seed: decides which images are compared and the noise.

    Raises:
        ConfigError: fewer than two images, or a schedule that ends without signal, where δ means nothing.
    """
    require(len(latents) > 1, f"a grid search compares images with each other: {len(latents)} is too few")
    drifts = [_scalar(delta, model, formulation) for delta in config.deltas]
    generator = torch_generator(seed, "drift-grid")
    rows = torch.randperm(len(latents), generator=generator)[: config.images]
    real = latents[rows].to(model.device, model.dtype).float()
    noise = torch.randn((len(rows), *model.latent_shape), generator=generator)
    with torch.no_grad():
        context = model.embed([prompts[row] for row in rows])
    sampler = make_sampler(model.scheduler, steps=config.steps)
    within_real = _mean_distance(real, real)
    trials = []
    for done, (delta, drift) in enumerate(zip(config.deltas, drifts, strict=True)):
        drawn = sample(model, context, noise, sampler, drift).float()
        between = _mean_distance(drawn, real)
        energy = 2 * between - _mean_distance(drawn, drawn) - within_real
        trials.append(Trial(delta, energy, {"mean_l1": between, "energy_distance": energy}))
        progress(done + 1, len(config.deltas))
    return trials


def _scalar(delta: float, model: Denoiser, formulation: str) -> LatentDrift | None:
    return LatentDrift(drift_from_shift(delta, model.scheduler.alphas_cumprod), formulation) if delta else None


def _mean_distance(first: Tensor, second: Tensor) -> float:
    """Mean over pairs of the mean absolute difference of latents; a set with itself leaves out each one's own zero."""
    flat_first, flat_second = first.flatten(1), second.flatten(1)
    total = float(torch.cdist(flat_first, flat_second, p=1).double().sum()) / flat_first.shape[1]
    pairs = len(first) * (len(first) - 1) if first is second else len(first) * len(second)
    return total / pairs
