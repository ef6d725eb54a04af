"""Counterfactuals of scans by any editor: encode, invert each scan once, edit it under each target, decode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ld_common.core.config import require
from ld_common.core.errors import ConfigError
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import BaseModel, Denoiser
from ld_common.diffusion.conditioning import Condition, image_condition
from ld_common.diffusion.drift import centre, restore
from ld_common.diffusion.longitudinal import AttributeChange, LongitudinalDrift
from ld_common.editing.base import EditDrift, Editor
from ld_common.editing.history import ScanHistory
from ld_common.editing.moves import Mover
from ld_common.editing.registry import EDITORS
from ld_common.imaging.modality import AGE, Attributes, Modality
from ld_common.metrics.structure import Measure, area_of, edge_of

Progress = Callable[[int], None]
"""Called with the number of images and edits finished since the last call."""


@dataclass(frozen=True)
class Edit:
    """One edit of one scan: the scan's row and the prompt that the answer shall show."""

    scan: int
    target: str
    delta: float = 0.0
    """A further shift of this answer, spread evenly over the whole schedule (arXiv 2412.20651, Eq. 4)."""
    change: tuple[float, ...] = ()
    """Target minus source `Modality.condition_vector`, for networks that take the scan as input."""
    asked: AttributeChange | None = None
    """The same for a longitudinal drift; without it, the drift changes nothing."""


def edit_to(modality: Modality, scan: int, source: Attributes, target: Attributes, delta: float = 0.0) -> Edit:
    """The edit that gives a scan other attributes.

    Args:
        modality: for prompts and condition vectors.
        scan: the scan's row.
        source: all attributes of the scan.
        target: the attributes that change.
        delta: as in `Edit`.
    """
    attributes = source | target
    vectors = zip(modality.condition_vector(attributes), modality.condition_vector(source), strict=True)
    change = tuple(after - before for after, before in vectors)
    return Edit(scan, modality.prompt(attributes), delta, change, attribute_change(modality, source, attributes))


def attribute_change(modality: Modality, source: Attributes, target: Attributes) -> AttributeChange:
    """Both as a longitudinal drift takes them; `age`, where the modality has it, is what passes with the years."""
    numeric = AGE in modality.attributes and not modality.attributes[AGE].categories
    years = float(target[AGE]) - float(source[AGE]) if numeric else 0.0
    switched = target | ({AGE: source[AGE]} if numeric else {})
    rows = [tuple(modality.design_vector(attributes)) for attributes in (source, switched, target)]
    return AttributeChange(rows[0], rows[1], rows[2], years)


@dataclass(frozen=True, eq=False)
class Past:
    """What is known of scans' patients beside the scans: earlier visits, if any, and what calibrates answers."""

    histories: Mapping[int, ScanHistory]
    """By the scan's row."""
    area: Measure | None = None
    edge: Measure | None = None
    """Of the structure that the modality measures first: what calibrates the change beside the latents."""
    one_volume: bool = False
    """Whether the scans are slices of one volume, whose growth is measured over all of them."""


def past_of(modality: Modality, histories: Mapping[int, ScanHistory], one_volume: bool = False) -> Past | None:
    """The histories with what the modality measures; None where there are none."""
    return Past(histories, area_of(modality), edge_of(modality), one_volume) if histories else None


@dataclass(frozen=True)
class Counterfactuals:
    """Pictures in [-1, 1]."""

    autoencoded: Tensor
    """What the VAE alone returns, `(N,1,S,S)`."""
    reconstructions: Tensor
    """What inversion and denoising without an edit return, `(N,1,S,S)`; `autoencoded` where the editor is exact."""
    images: Tensor
    """The answers `(M,1,S,S)`, in the order of the edits."""


def draw_counterfactuals(
    base: BaseModel,
    images: Tensor,
    source: Sequence[str],
    edits: Sequence[Edit],
    editor: Editor,
    progress: Progress = lambda done: None,
    drift: EditDrift | None = None,
    seed: int = 0,
    past: Past | None = None,
    redraw: bool = False,
) -> Counterfactuals:
    """Draw the answers to `edits` of `images`; each scan is inverted once however many edits it has.

    Args:
        base: the base with the release's adapter.
        images: `(N,1,S,S)` in [-1, 1].
        source: prompt of each image.
        edits: what is asked.
        editor: how.
        progress: called as scans and edits finish.
        drift: the drift that the adapter was trained with. As z_T comes from the image, `prior` plays no part here; a
            longitudinal one gives editors the change that it predicts.
        seed: noise of editors that draw any. All images get the same noise, so that an answer does not depend on the
            rest of the batch and the slices of a volume fit each other.
        past: earlier visits of the scans' patients.
        redraw: draw the reconstructions of exact editors too, to measure how exact they are.

    Raises:
        ConfigError: the editor needs a longitudinal drift, or takes no history.
    """
    latents = torch.cat([base.encode(chunk) for chunk in images.split(editor.batch_size)])
    latent_editor = LatentEditor(base, sorted({*source, *(edit.target for edit in edits)}), editor, drift, seed)
    if past is not None:
        latent_editor.remember(base, images, latents, past)
    inverted = latent_editor.invert(latents, source, progress)
    answers = _decode(base, latent_editor.edit(inverted, edits, progress), editor.batch_size)
    autoencoded = _decode(base, latents, editor.batch_size)
    if editor.exact and not redraw:
        return Counterfactuals(autoencoded, autoencoded, answers)
    unchanged = latent_editor.redraw(inverted) if editor.exact else inverted.reconstructions
    return Counterfactuals(autoencoded, _decode(base, unchanged, editor.batch_size), answers)


def draw_several(
    base: BaseModel,
    images: Tensor,
    source: Sequence[str],
    edits: Sequence[Edit],
    editor: Editor,
    seeds: Sequence[int],
    progress: Progress = lambda done: None,
    drift: EditDrift | None = None,
    past: Past | None = None,
) -> tuple[Counterfactuals, Tensor]:
    """The same edits under several seeds; the other arguments are those of `draw_counterfactuals`.

    Returns:
        The first seed's reconstructions with the mean of the seeds' answers; and each seed's answers `(M,K,1,S,S)`.
    """
    drawn = [draw_counterfactuals(base, images, source, edits, editor, progress, drift, seed, past) for seed in seeds]
    answers = torch.stack([counterfactuals.images for counterfactuals in drawn], 1)
    return replace(drawn[0], images=answers.mean(1)), answers


@dataclass(frozen=True, eq=False)
class InvertedScans:
    """The inversion of N scans, in latents."""

    scans: Tensor
    """`(N,C,h,w)`, centred where the drift is."""
    source: list[str]
    """Prompt of each."""
    states: Tensor
    """The editor's, `(N,...)`."""
    reconstructions: Tensor
    """`(N,C,h,w)`: what an edit that changes nothing returns; the scans' own latents where the editor is exact."""


class LatentEditor:
    """Inversion and editing in latents; `draw_counterfactuals` adds the VAE on both sides."""

    def __init__(
        self, model: Denoiser, prompts: Sequence[str], editor: Editor, drift: EditDrift | None, seed: int = 0
    ) -> None:
        self.editor = editor
        self.drift = None if isinstance(drift, LongitudinalDrift) else drift
        self.mover = Mover(drift, editor) if isinstance(drift, LongitudinalDrift) else None
        require(
            self.mover is not None or not editor.needs_longitudinal,
            f"edit.name {editor.name} needs a release of a study with drift.shape longitudinal",
        )
        self.context = editor.context(model, self.drift)
        self._generator = torch_generator(seed, "edit")
        with torch.no_grad():
            self._embedded = dict(zip(prompts, model.embed(prompts), strict=True))

    def remember(self, base: BaseModel, images: Tensor, latents: Tensor, past: Past) -> None:
        """Calibrate answers by what is known of the patients; raises `ConfigError` where there are visits in vain."""
        if self.mover is None or not self.editor.takes_move:
            if not any(history.years for history in past.histories.values()):
                return
            knowing = ", ".join(name for name in EDITORS if EDITORS.load(name).takes_move)
            raise ConfigError(
                f"edit.name {self.editor.name} takes no history here: use {knowing}, on a release of a study with "
                "drift.shape longitudinal"
            )
        volume = latents if past.one_volume else None
        known = past.histories, images, past.area, past.edge, volume
        self.mover = Mover(self.mover.drift, self.editor, base, *known)

    def invert(self, latents: Tensor, source: Sequence[str], progress: Progress = lambda done: None) -> InvertedScans:
        """Invert image latents `(N,C,h,w)` under their prompts."""
        states, reconstructions, scans = [], [latents[:0]], centre(latents, self.drift)
        count = self.editor.noise_count(self.context)
        drawn = torch.randn((count, *latents.shape[1:]), generator=self._generator)
        noise = drawn.to(latents).expand(len(latents), *drawn.shape)
        for rows in torch.arange(len(latents)).split(self.editor.batch_size):
            condition = self._condition([source[row] for row in rows], scans[rows])
            states.append(self.editor.invert(self.context, scans[rows], condition, noise[rows]))
            if not self.editor.exact:
                reconstructions.append(self._redrawn(states[-1], condition))
            progress(len(rows))
        unchanged = latents if self.editor.exact else torch.cat(reconstructions)
        return InvertedScans(scans, list(source), torch.cat(states), unchanged)

    def redraw(self, inverted: InvertedScans) -> Tensor:
        """What the editor's steps return without an edit, `(N,C,h,w)`: the measure of what `exact` promises."""
        rows = torch.arange(len(inverted.scans)).split(self.editor.batch_size)
        conditions = [self._condition([inverted.source[row] for row in some], inverted.scans[some]) for some in rows]
        drawn = [self._redrawn(inverted.states[some], each) for some, each in zip(rows, conditions, strict=True)]
        return torch.cat([inverted.scans[:0], *drawn])

    def _redrawn(self, state: Tensor, condition: Condition) -> Tensor:
        return restore(self.editor.edit(self.context, state, condition, None, self.context.shift), self.drift)

    def edit(self, inverted: InvertedScans, edits: Sequence[Edit], progress: Progress = lambda done: None) -> Tensor:
        """The scans under other prompts: latents `(M,C,h,w)` in the order of the edits."""
        answers = []
        for first in range(0, len(edits), self.editor.batch_size):
            batch = edits[first : first + self.editor.batch_size]
            rows = [edit.scan for edit in batch]
            scans, changes = inverted.scans[rows], [edit.change for edit in batch]
            source = self._condition([inverted.source[row] for row in rows], scans)
            target = replace(
                self._condition([edit.target for edit in batch], scans, changes), move=self._moves(batch, scans)
            )
            answer = self.editor.edit(self.context, inverted.states[rows], source, target, self._shifts(batch))
            answers.append(restore(answer, self.drift))
            progress(len(batch))
        return torch.cat(answers) if answers else torch.empty((0, *self.context.model.latent_shape))

    def _moves(self, edits: Sequence[Edit], scans: Tensor) -> Tensor | None:
        """What the longitudinal drift predicts to change `(M,C,h,w)`; None without one."""
        mover = self.mover
        if mover is None or not self.editor.takes_move:
            return None
        moves = [
            torch.zeros_like(scan) if edit.asked is None else mover.move(edit.scan, scan, edit.asked)
            for edit, scan in zip(edits, scans, strict=True)
        ]
        return torch.stack(moves)

    def _shifts(self, edits: Sequence[Edit]) -> Tensor | None:
        """What is added after each step: the drift's shift, and each edit's `(M,1,1,1)`; None for neither."""
        shift = self.context.shift
        if not any(edit.delta for edit in edits):
            return shift
        if "delta" in self.editor.unused:
            raise ConfigError(f"editor {self.editor.name} has no reverse steps that a δ could shift: leave it out")
        steps = len(self.context.schedule.timesteps)
        added = torch.tensor([edit.delta / steps for edit in edits]).view(-1, 1, 1, 1)
        return added if shift is None else shift + added

    def _condition(self, prompts: Sequence[str], scans: Tensor, changes: Sequence[tuple[float, ...]] = ()) -> Condition:
        context = torch.stack([self._embedded[prompt] for prompt in prompts])
        if not self.context.model.image_conditioned:
            return Condition(context)
        deltas = torch.zeros(len(scans), max((len(change) for change in changes), default=0))
        for row, change in enumerate(changes):
            deltas[row, : len(change)] = torch.tensor(change)
        return Condition(context, image_condition(scans, deltas))


def _decode(base: BaseModel, latents: Tensor, batch_size: int) -> Tensor:
    if not len(latents):
        return torch.empty((0, 1, base.resolution, base.resolution))
    return torch.cat([base.decode(chunk) for chunk in latents.split(batch_size)])
