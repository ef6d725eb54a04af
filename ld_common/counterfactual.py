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
from ld_common.models import BaseModel
from ld_common.sampling import Epsilon, denoise, epsilon_model, invert, trajectory


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
    batch_size: int = 16
    """Counterfactuals that are denoised together."""

    def __post_init__(self) -> None:
        require(self.steps > 0, f"steps is {self.steps}: it must be above 0")
        require(0 < self.depth <= 1, f"depth is {self.depth}: it must lie above 0 and up to 1")
        require(0 <= self.strength < math.inf, f"strength is {self.strength}: it must be a number, 0 or above")
        require(self.refinements >= 0, f"refinements is {self.refinements}: it must not be negative")
        require(self.batch_size > 0, f"batch_size is {self.batch_size}: it must be above 0")


@dataclass(frozen=True)
class Edit:
    """One question about one scan: which image `scan`, and the prompt it should show."""

    scan: int
    target: str


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
) -> Counterfactuals:
    """Answer `edits` about `images`; each scan is inverted once however many edits it has.

    Args:
        base: the base with the release's adapter in its UNet.
        images: `(N,1,S,S)` in [-1, 1].
        factual: what each image shows, as a prompt.
        edits: what is asked.
        progress: called with the number of images and edits finished since the last call.
    """
    path = trajectory(base.scheduler, config.steps)
    start = len(path.timesteps) - max(1, round(config.depth * len(path.timesteps)))
    prompts = sorted({*factual, *(edit.target for edit in edits)})
    embedded = dict(zip(prompts, base.embed(prompts), strict=True))
    latents = torch.cat([base.encode(chunk) for chunk in images.split(config.batch_size)])
    noisy, restored = torch.empty_like(latents), torch.empty_like(latents)
    for rows in torch.arange(len(images)).split(config.batch_size):
        epsilon = epsilon_model(base.unet, base.scheduler, torch.stack([embedded[factual[row]] for row in rows]))
        noisy[rows] = invert(latents[rows], epsilon, path, start, config.refinements)
        restored[rows] = denoise(noisy[rows], epsilon, path, start)
        progress(len(rows))
    drawn = []
    for first in range(0, len(edits), config.batch_size):
        batch = edits[first : first + config.batch_size]
        epsilon = difference_guidance(
            base,
            torch.stack([embedded[factual[edit.scan]] for edit in batch]),
            torch.stack([embedded[edit.target] for edit in batch]),
            config.strength,
        )
        drawn.append(denoise(noisy[[edit.scan for edit in batch]], epsilon, path, start))
        progress(len(batch))
    answers = torch.cat(drawn) if drawn else latents[:0]
    return Counterfactuals(*(_decode(base, part, config.batch_size) for part in (latents, restored, answers)))


def difference_guidance(base: BaseModel, factual: Tensor, target: Tensor, scale: float) -> Epsilon:
    """ε_factual + scale · (ε_target - ε_factual) for prompt embeddings `(B,L,D)`, both in one batch."""
    both = epsilon_model(base.unet, base.scheduler, torch.cat([factual, target]))

    def epsilon(latents: Tensor, timestep: int) -> Tensor:
        under_factual, under_target = both(torch.cat([latents, latents]), timestep).chunk(2)
        return under_factual + scale * (under_target - under_factual)

    return epsilon


def _decode(base: BaseModel, latents: Tensor, batch_size: int) -> Tensor:
    if not len(latents):
        return torch.empty((0, 1, base.side, base.side))
    return torch.cat([base.decode(chunk) for chunk in latents.split(batch_size)])
