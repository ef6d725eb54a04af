"""Counterfactuals of a scan: abduction of what is the patient's own, action by another prompt, prediction by denoising.

How, a method says (`ld_common.editing.registry`): the default, `invert`, finds the noise from which the scan is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ld_common.core.config import nearest, require
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import BaseModel, Condition, Denoiser, seen_scan
from ld_common.diffusion.drift import Drift, centre, restore, step_shift
from ld_common.diffusion.schedule import trajectory
from ld_common.editing.registry import METHODS, Guidance, Setting
from ld_common.imaging.modality import Attributes, Modality


@dataclass
class EditConfig:
    """How strongly and how deeply a scan is edited."""

    method: str = "invert"
    """invert, belm, ddpm, flowedit, pix2pix-zero, sdedit or instruct: see `ld_common.editing.registry`."""
    steps: int = 50
    """Steps of the whole DDIM trajectory."""
    depth: float = 0.7
    """Share of the trajectory that is inverted, from 0 (none) to 1 (down to noise)."""
    strength: float = 2.0
    """w of the difference guidance (its guidance scale); 0 returns the reconstruction."""
    late_share: float = 1.0
    """Share of w that is left at late, less noisy timesteps; 1 guides all alike, 0 is a guidance interval (arXiv
    2404.07724) that ends there."""
    late_below: float = 0.8
    """Share of the schedule's timesteps below which one is late."""
    refinements: int = 1
    """Fixed-point iterations for each inversion step."""
    attention: float = 0.1
    """pix2pix-zero: how far each step moves towards where the scan's own prompt looked."""
    feedback: float = 1.0
    """flowedit: share of the edit so far that the network sees; less than 1 leaves more of the patient's own size."""
    delta: float = 0.0
    """A shift of every answer's reverse steps, δ in the paper's units; `ld-client drift --choice counterfactual` and
    `ld-generate --drift auto` look for one."""
    batch_size: int = 16
    """Counterfactuals that are denoised together."""

    def __post_init__(self) -> None:
        require(self.method in METHODS, f"method is '{self.method}': {nearest(self.method, list(METHODS))}")
        require(self.steps > 0, f"steps is {self.steps}: it must be above 0")
        require(0 < self.depth <= 1, f"depth is {self.depth}: it must lie above 0 and up to 1")
        require(0 <= self.strength < math.inf, f"strength is {self.strength}: it must be a number, 0 or above")
        for name in ("late_share", "late_below", "feedback"):
            require(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}: it must lie from 0 to 1")
        require(self.refinements >= 0, f"refinements is {self.refinements}: it must not be negative")
        require(0 <= self.attention < math.inf, f"attention is {self.attention}: it must be a number, 0 or above")
        require(math.isfinite(self.delta), f"delta is {self.delta}: it must be a number")
        require(self.batch_size > 0, f"batch_size is {self.batch_size}: it must be above 0")


@dataclass(frozen=True)
class Edit:
    """One question about one scan: which image `scan`, and the prompt it should show."""

    scan: int
    target: str
    delta: float = 0.0
    """A further shift of this answer, spread evenly over a whole trajectory (arXiv 2412.20651, Eq. 4)."""
    change: tuple[float, ...] = ()
    """What differs from the scan, a difference of `Modality.place`: what networks that see the scan are told."""


def edit_to(modality: Modality, scan: int, factual: Attributes, target: Attributes, delta: float = 0.0) -> Edit:
    """The question how scan number `scan` would look with other attributes.

    Args:
        modality: whose words and places.
        scan: its number.
        factual: all that is known of it.
        target: the attributes that change.
        delta: as in `Edit`.
    """
    wanted = factual | target
    places = zip(modality.place(wanted), modality.place(factual), strict=True)
    return Edit(scan, modality.describe(wanted), delta, tuple(after - before for after, before in places))


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
    seed: int = 0,
) -> Counterfactuals:
    """Answer `edits` about `images`; each scan is abducted once however many edits it has.

    Args:
        base: the base with the release's adapter.
        images: `(N,1,S,S)` in [-1, 1].
        factual: what each image shows, as a prompt.
        edits: what is asked.
        progress: called with the number of images and edits finished since the last call.
        drift: the drift that the adapter was trained with. As z_T comes from the image, `prior` plays no part here.
        seed: decides the noise of methods that draw any; all images get the same, so that an answer does not depend on
            what else is asked, and the slices of a volume fit each other.
    """
    latents = torch.cat([base.encode(chunk) for chunk in images.split(config.batch_size)])
    editor = LatentEditor(base, sorted({*factual, *(edit.target for edit in edits)}), config, drift, seed)
    abducted = editor.abduct(latents, factual, progress)
    answers = editor.answer(abducted, edits, progress)
    found = latents, abducted.reconstructions, answers
    return Counterfactuals(*(_decode(base, part, config.batch_size) for part in found))


def draw_several(
    base: BaseModel,
    images: Tensor,
    factual: Sequence[str],
    edits: Sequence[Edit],
    config: EditConfig,
    seeds: Sequence[int],
    progress: Callable[[int], None] = lambda done: None,
    drift: Drift | None = None,
) -> tuple[Counterfactuals, Tensor]:
    """The same questions under several seeds; the other arguments are those of `draw_counterfactuals`.

    Returns:
        What it returns, with the first seed's reconstructions and the mean of the seeds' answers; and each seed's
        answers `(M,K,1,S,S)`.
    """
    drawn = [draw_counterfactuals(base, images, factual, edits, config, progress, drift, seed) for seed in seeds]
    each = torch.stack([one.images for one in drawn], 1)
    return replace(drawn[0], images=each.mean(1)), each


@dataclass(frozen=True, eq=False)
class Abducted:
    """What was found of N scans, in latents."""

    scans: Tensor
    """`(N,C,h,w)`, centred where the drift is."""
    factual: list[str]
    """What each shows."""
    states: Tensor
    """The method's, `(N,...)`."""
    reconstructions: Tensor
    """`(N,C,h,w)`: what a question that changes nothing returns."""


class LatentEditor:
    """Abduction and prediction in latents; `draw_counterfactuals` adds the VAE on both sides."""

    def __init__(
        self, model: Denoiser, prompts: Sequence[str], config: EditConfig, drift: Drift | None, seed: int = 0
    ) -> None:
        self.config, self.drift, self.method = config, drift, METHODS[config.method]()
        path = trajectory(model.scheduler, config.steps)
        steps = len(path.timesteps)
        start = steps - max(1, round(config.depth * steps))
        shift = step_shift(drift, steps, model.scheduler.alphas_cumprod)
        late_below = config.late_below * len(model.scheduler.alphas_cumprod)
        guidance = Guidance(config.strength, config.late_share, late_below)
        self.setting = Setting(
            model, path, start, guidance, config.refinements, drift, shift, config.attention, config.feedback
        )
        self._generator = torch_generator(seed, "edit")
        with torch.no_grad():
            self._embedded = dict(zip(prompts, model.embed(prompts), strict=True))

    def abduct(
        self, latents: Tensor, factual: Sequence[str], progress: Callable[[int], None] = lambda done: None
    ) -> Abducted:
        """What is the patient's own in image latents `(N,C,h,w)` that show `factual`."""
        states, restored, scans = [], [latents[:0]], centre(latents, self.drift)
        drawn = torch.randn((self.method.draws(self.setting), *latents.shape[1:]), generator=self._generator)
        noise = drawn.to(latents).expand(len(latents), *drawn.shape)
        for rows in torch.arange(len(latents)).split(self.config.batch_size):
            shown = self._condition([factual[row] for row in rows], scans[rows])
            state = self.method.abduct(self.setting, scans[rows], shown, noise[rows])
            found = self.method.answer(self.setting, state, shown, None, self.setting.shift)
            states.append(state)
            restored.append(restore(found, self.drift))
            progress(len(rows))
        return Abducted(scans, list(factual), torch.cat(states), torch.cat(restored))

    def answer(
        self, abducted: Abducted, edits: Sequence[Edit], progress: Callable[[int], None] = lambda done: None
    ) -> Tensor:
        """The scans under other prompts: latents `(M,C,h,w)` in the order of the edits."""
        drawn = []
        for first in range(0, len(edits), self.config.batch_size):
            batch = edits[first : first + self.config.batch_size]
            scans = [edit.scan for edit in batch]
            shown = self._condition([abducted.factual[scan] for scan in scans], abducted.scans[scans])
            changes = [edit.change for edit in batch]
            wanted = self._condition([edit.target for edit in batch], abducted.scans[scans], changes)
            found = self.method.answer(self.setting, abducted.states[scans], shown, wanted, self._shifts(batch))
            drawn.append(restore(found, self.drift))
            progress(len(batch))
        shape = self.setting.model.latent_shape
        return torch.cat(drawn) if drawn else torch.empty((0, *shape))

    def _shifts(self, edits: Sequence[Edit]) -> Tensor | None:
        """What is added after each step: the drift's own, and each edit's `(M,1,1,1)`; None for nothing at all."""
        own = self.setting.shift
        if not any(edit.delta for edit in edits):
            return own
        steps = len(self.setting.path.timesteps)
        added = torch.tensor([edit.delta / steps for edit in edits]).view(-1, 1, 1, 1)
        return added if own is None else own + added

    def _condition(self, prompts: Sequence[str], scans: Tensor, changes: Sequence[tuple[float, ...]] = ()) -> Condition:
        context = torch.stack([self._embedded[prompt] for prompt in prompts])
        if not self.setting.model.sees_baseline:
            return Condition(context)
        told = torch.zeros(len(scans), max((len(change) for change in changes), default=0))
        for row, change in enumerate(changes):
            told[row, : len(change)] = torch.tensor(change)
        return Condition(context, seen_scan(scans, told))


def _decode(base: BaseModel, latents: Tensor, batch_size: int) -> Tensor:
    if not len(latents):
        return torch.empty((0, 1, base.side, base.side))
    return torch.cat([base.decode(chunk) for chunk in latents.split(batch_size)])
