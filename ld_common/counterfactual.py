"""Counterfactuals of a scan: abduction by inversion, action by another prompt, prediction by denoising.

Inversion under the factual prompt finds the patient's own noise; denoising it under the target prompt keeps the
patient and changes what the prompt changed (Diff-SCM, arXiv 2202.10166). Difference guidance
ε = ε_factual + w (ε_target - ε_factual) needs no unconditional model and returns the image at w = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ld_common.config import require
from ld_common.drift import Drift, centre, restore, step_shift
from ld_common.inversion import Prediction, Predictor, denoise, invert, predictor, trajectory
from ld_common.models import BaseModel, Denoiser


@dataclass
class EditConfig:
    """How strongly and how deeply a scan is edited."""

    steps: int = 50
    """Steps of the whole DDIM trajectory."""
    depth: float = 0.7
    """Share of the trajectory that is inverted, from 0 (none) to 1 (down to noise)."""
    strength: float = 2.0
    """w of the difference guidance (its guidance scale); 0 returns the reconstruction."""
    refinements: int = 1
    """Fixed-point iterations for each inversion step."""
    delta: float = 0.0
    """A shift of every answer's reverse steps, δ in the paper's units; `ld-client drift --choice counterfactual` and
    `ld-generate --drift auto` look for one."""
    batch_size: int = 16
    """Counterfactuals that are denoised together."""

    def __post_init__(self) -> None:
        require(self.steps > 0, f"steps is {self.steps}: it must be above 0")
        require(0 < self.depth <= 1, f"depth is {self.depth}: it must lie above 0 and up to 1")
        require(0 <= self.strength < math.inf, f"strength is {self.strength}: it must be a number, 0 or above")
        require(self.refinements >= 0, f"refinements is {self.refinements}: it must not be negative")
        require(math.isfinite(self.delta), f"delta is {self.delta}: it must be a number")
        require(self.batch_size > 0, f"batch_size is {self.batch_size}: it must be above 0")


@dataclass(frozen=True)
class Edit:
    """One question about one scan: which image `scan`, and the prompt it should show."""

    scan: int
    target: str
    delta: float = 0.0
    """A further shift of this answer, spread evenly over a whole trajectory (arXiv 2412.20651, Eq. 4)."""


@dataclass(frozen=True)
class Counterfactuals:
    """All in [-1, 1]: what the VAE alone returns `(N,1,S,S)`, what inversion and denoising return `(N,1,S,S)`,
    and the answers `(M,1,S,S)` in the order of the edits."""

    autoencoded: Tensor
    reconstructions: Tensor
    images: Tensor


def draw_counterfactuals(
    base: BaseModel,
    images: Tensor,
    factual: Sequence[str],
    edits: Sequence[Edit],
    config: EditConfig,
    progress: Callable[[int], None] = lambda done: None,
    drift: Drift | None = None,
) -> Counterfactuals:
    """Answer `edits` about `images`; each scan is inverted once however many edits it has.

    Args:
        base: the base with the release's adapter.
        images: `(N,1,S,S)` in [-1, 1].
        factual: what each image shows, as a prompt.
        edits: what is asked.
        progress: called with the number of images and edits finished since the last call.
        drift: the drift that the adapter was trained with. As z_T comes from the image, `prior` plays no part here.
    """
    latents = torch.cat([base.encode(chunk) for chunk in images.split(config.batch_size)])
    editor = LatentEditor(base, sorted({*factual, *(edit.target for edit in edits)}), config, drift)
    noisy, restored = editor.abduct(latents, factual, progress)
    answers = editor.answer(noisy, factual, edits, progress)
    return Counterfactuals(*(_decode(base, part, config.batch_size) for part in (latents, restored, answers)))


class LatentEditor:
    """Abduction and prediction in latents; `draw_counterfactuals` adds the VAE on both sides."""

    def __init__(self, model: Denoiser, prompts: Sequence[str], config: EditConfig, drift: Drift | None) -> None:
        self.model, self.config, self.drift = model, config, drift
        self.path = trajectory(model.scheduler, config.steps)
        steps = len(self.path.timesteps)
        self.start = steps - max(1, round(config.depth * steps))
        self.shift = step_shift(drift, steps, model.scheduler.alphas_cumprod)
        with torch.no_grad():
            self._embedded = dict(zip(prompts, model.embed(prompts), strict=True))

    def abduct(
        self, latents: Tensor, factual: Sequence[str], progress: Callable[[int], None] = lambda done: None
    ) -> tuple[Tensor, Tensor]:
        """Image latents `(N,C,h,w)` -> their noise and what denoising it under the same prompts returns, both alike."""
        noisy, restored = torch.empty_like(latents), torch.empty_like(latents)
        for rows in torch.arange(len(latents)).split(self.config.batch_size):
            predict = predictor(self.model, self._context([factual[row] for row in rows]), self.drift)
            inner = centre(latents[rows], self.drift)
            noisy[rows] = invert(inner, predict, self.path, self.start, self.config.refinements, self.shift)
            restored[rows] = restore(denoise(noisy[rows], predict, self.path, self.start, self.shift), self.drift)
            progress(len(rows))
        return noisy, restored

    def answer(
        self,
        noisy: Tensor,
        factual: Sequence[str],
        edits: Sequence[Edit],
        progress: Callable[[int], None] = lambda done: None,
    ) -> Tensor:
        """The abducted noise `(N,C,h,w)` under other prompts: latents `(M,C,h,w)` in the order of the edits."""
        drawn = [noisy[:0]]
        for first in range(0, len(edits), self.config.batch_size):
            batch = edits[first : first + self.config.batch_size]
            contexts = self._context([factual[edit.scan] for edit in batch] + [edit.target for edit in batch])
            predict = difference_guidance(predictor(self.model, contexts, self.drift), self.config.strength)
            own = denoise(noisy[[edit.scan for edit in batch]], predict, self.path, self.start, self._shifts(batch))
            drawn.append(restore(own, self.drift))
            progress(len(batch))
        return torch.cat(drawn)

    def _shifts(self, edits: Sequence[Edit]) -> Tensor | None:
        """What is added after each step: the drift's own, and each edit's `(M,1,1,1)`; None for nothing at all."""
        if not any(edit.delta for edit in edits):
            return self.shift
        added = torch.tensor([edit.delta / len(self.path.timesteps) for edit in edits]).view(-1, 1, 1, 1)
        return added if self.shift is None else self.shift + added

    def _context(self, prompts: Sequence[str]) -> Tensor:
        return torch.stack([self._embedded[prompt] for prompt in prompts])


def difference_guidance(both: Predictor, scale: float) -> Predictor:
    """factual + scale · (target - factual), of a predictor whose batch holds the factual prompts, then the target's."""

    def predict(latents: Tensor, timestep: int) -> Prediction:
        found = both(torch.cat([latents, latents]), timestep)
        return Prediction(_guided(found.clean, scale), _guided(found.noise, scale))

    return predict


def _guided(pair: Tensor, scale: float) -> Tensor:
    factual, target = pair.chunk(2)
    return factual + scale * (target - factual)


def _decode(base: BaseModel, latents: Tensor, batch_size: int) -> Tensor:
    if not len(latents):
        return torch.empty((0, 1, base.side, base.side))
    return torch.cat([base.decode(chunk) for chunk in latents.split(batch_size)])
