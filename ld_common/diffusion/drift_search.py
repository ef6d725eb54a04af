"""Finding a scalar drift δ, in the paper's units (the shift of z_T), by trying a grid of them.

`grid` is the paper's search (arXiv 2412.20651): the δ whose samples are nearest to the site's images in L1, by Monte
Carlo, inference only. As E|x - y| alone is least where all samples are the median image, the energy distance
2 E|x - y| - E|x - x'| - E|y - y'| is what is minimised; the plain term is reported beside it.
`counterfactual` is its Eq. 5, λ l_o(f(x'), y') + l_in(x, x'): l_o says whether the edit reached the target, by the
denoising network itself as the classifier (arXiv 2303.16203); l_in is the L1 distance to the reconstruction, in
latents. Its δ shifts the reverse steps of edits (`edit.delta`), not the prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ld_common.core.config import require
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import Condition, Denoiser
from ld_common.diffusion.drift import Drift, centre, drift_from_shift
from ld_common.diffusion.sampling import make_sampler, sample
from ld_common.diffusion.schedule import predictor
from ld_common.editing.pipeline import Edit, EditConfig, LatentEditor

MOST_TRIALS = 1000
CLASSIFIER_TIMESTEPS = (0.2, 0.35, 0.5, 0.65, 0.8)
"""Where along the noise schedule the denoising classifier looks; the same noise for every prompt."""
CLASSIFIER_TEMPERATURE = 0.02
"""Difference of the mean squared error, relative to its mean, that counts as one logit."""


@dataclass
class SearchConfig:
    """Which δ are tried, and with how many images."""

    lowest: float = -0.2
    highest: float = 0.2
    spacing: float = 0.05
    """The paper's grid."""
    images: int = 64
    """Images compared, at most."""
    steps: int = 25
    """Sampler steps of each."""
    weight: float = 1.0
    """λ of `counterfactual`: 0 asks only that the patient stays."""
    targets: list[str] = field(default_factory=list)
    """`counterfactual` asks these of each scan, as `diagnosis=AD`; a scan that is so already is left out."""

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, (self.lowest, self.highest, self.spacing)))
        require(finite, "drift.search.lowest, highest and spacing must be numbers")
        require(self.lowest <= self.highest, "drift.search.lowest must not be above drift.search.highest")
        require(self.spacing > 0, f"drift.search.spacing is {self.spacing}: it must be above 0")
        require(self.count <= MOST_TRIALS, f"drift.search has {self.count} δ, at most {MOST_TRIALS}: widen spacing")
        require(self.images > 1 and self.steps > 0, "drift.search needs images above 1 and steps above 0")
        require(self.weight >= 0, f"drift.search.weight is {self.weight}: it must not be negative")

    @property
    def count(self) -> int:
        """How many δ are tried."""
        return int((self.highest - self.lowest) / self.spacing + 1e-6) + 1

    @property
    def deltas(self) -> list[float]:
        """The grid, rounded to six digits."""
        return [round(self.lowest + index * self.spacing, 6) for index in range(self.count)]


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


def search_counterfactual(
    model: Denoiser,
    latents: Tensor,
    factual: Sequence[str],
    edits: Sequence[Edit],
    config: SearchConfig,
    edit: EditConfig,
    seed: int,
    drift: Drift | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Trial]:
    """Try each δ in edits: λ times whether the target was reached, plus how far the scan moved (Eq. 5).

    Args:
        model: the base with the adapter that edits.
        latents: scaled latents `(N,C,h,w)` of real scans.
        factual: what each shows.
        edits: what is asked of which scan; at most `config.images` are drawn, by `seed`.
        config: which δ, and λ.
        edit: how edits are drawn.
        seed: decides which edits are drawn and the classifier's noise.
        drift: the drift that the adapter was trained with.
    """
    generator = torch_generator(seed, "drift-counterfactual")
    kept = torch.randperm(len(edits), generator=generator)[: config.images].tolist()
    scans = sorted({edits[index].scan for index in kept})
    chosen = [replace(edits[index], scan=scans.index(edits[index].scan), delta=0.0) for index in kept]
    own, shown = latents[scans].to(model.device, model.dtype), [factual[scan] for scan in scans]
    editor = LatentEditor(model, sorted({*shown, *(one.target for one in chosen)}), edit, drift)
    abducted = editor.abduct(own, shown)
    before = abducted.reconstructions[[one.scan for one in chosen]]
    noise = torch.randn((len(CLASSIFIER_TIMESTEPS), *model.latent_shape), generator=generator)
    trials = []
    for done, delta in enumerate(config.deltas):
        drawn = editor.answer(abducted, [replace(one, delta=delta) for one in chosen])
        inner = float((drawn - before).float().abs().mean())
        outer = _not_reached(
            model, drawn, [shown[one.scan] for one in chosen], [one.target for one in chosen], noise, edit, drift
        )
        trials.append(Trial(delta, config.weight * outer + inner, {"outer": outer, "inner": inner}))
        progress(done + 1, len(config.deltas))
    return trials


@torch.no_grad()
def _not_reached(
    model: Denoiser,
    latents: Tensor,
    factual: Sequence[str],
    target: Sequence[str],
    noise: Tensor,
    edit: EditConfig,
    drift: Drift | None,
) -> float:
    """Cross-entropy of the denoising classifier that is to tell each target from its factual prompt."""
    errors = []
    levels = model.scheduler.alphas_cumprod
    for prompts in (factual, target):
        total = torch.zeros(len(latents), device=latents.device)
        context = model.embed(prompts)
        for share, one in zip(CLASSIFIER_TIMESTEPS, noise.to(latents), strict=True):
            timestep = int(share * len(levels))
            signal = float(levels[timestep])
            for rows in torch.arange(len(latents)).split(edit.batch_size):
                noisy = signal**0.5 * centre(latents[rows], drift) + (1 - signal) ** 0.5 * one
                found = predictor(model, Condition(context[rows]), drift)(noisy, timestep).noise
                total[rows] += (found - one).float().square().mean((1, 2, 3))
        errors.append(total)
    both = torch.stack(errors, 1)
    logits = -both / (CLASSIFIER_TEMPERATURE * both.mean())
    return float(F.cross_entropy(logits, torch.ones(len(logits), dtype=torch.long, device=logits.device)))


def _scalar(delta: float, model: Denoiser, formulation: str) -> Drift | None:
    return Drift(drift_from_shift(delta, model.scheduler.alphas_cumprod), formulation) if delta else None


def _mean_distance(first: Tensor, second: Tensor) -> float:
    """Mean over pairs of the mean absolute difference of latents; a set with itself leaves out each one's own zero."""
    flat_first, flat_second = first.flatten(1), second.flatten(1)
    total = float(torch.cdist(flat_first, flat_second, p=1).double().sum()) / flat_first.shape[1]
    pairs = len(first) * (len(first) - 1) if first is second else len(first) * len(second)
    return total / pairs
