"""The axioms of sound counterfactuals (arXiv 2303.01274), as measures of their failure.

composition    the null edit returns the scan, once and several times over
reversibility  an edit and its inverse return the scan
effectiveness  a predictor trained on real images reads the target off the edited one
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ld_common.diffusion.base_model import BaseModel
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.editing.base import Editor
from ld_common.editing.counterfactuals import (
    Counterfactuals,
    Edit,
    Past,
    draw_counterfactuals,
    draw_several,
    edit_to,
    past_of,
)
from ld_common.editing.history import ScanHistory
from ld_common.imaging.modality import Attributes
from ld_common.metrics.image import psnr
from ld_common.release.release import Release, edit_drift
from ld_evaluate.dataset import EvaluationData
from ld_evaluate.predictors import Predictors

Metrics = dict[str, float]


@dataclass(frozen=True, eq=False)
class EditorRun:
    """What is judged: a release, asked through one editor."""

    base: BaseModel
    """With the release's adapter."""
    release: Release
    editor: Editor
    seeds: Sequence[int] = (0,)
    """Of the noise of editors that draw any; the mean of the seeds' images is judged."""

    @property
    def takes_history(self) -> bool:
        """Whether earlier visits calibrate its answers."""
        return self.editor.takes_move and isinstance(edit_drift(self.release), LongitudinalDrift)

    def draw(
        self,
        scans: Tensor,
        attributes: Sequence[Attributes],
        edits: Sequence[Edit],
        progress: Callable[[int], None] = lambda done: None,
        past: Past | None = None,
    ) -> tuple[Counterfactuals, Tensor]:
        """Edits of scans `(N,1,S,S)` with these attributes, averaged over the seeds; and those of each seed."""
        prompts = [self.release.modality.prompt(values) for values in attributes]
        return draw_several(
            self.base, scans, prompts, edits, self.editor, self.seeds, progress, edit_drift(self.release), past
        )


def composition(
    editor_run: EditorRun, data: EvaluationData, drawn: Counterfactuals, cycles: int, count: int
) -> Metrics:
    """PSNR lost against the VAE by one null edit of every scan, and by `cycles` of them on the first `count`."""
    scans, base = data.baselines.images, editor_run.base
    prompts = [data.modality.prompt(attributes) for attributes in data.baselines.attributes]
    drift, seed = edit_drift(editor_run.release), editor_run.seeds[0]

    def unchanged(pictures: Tensor) -> Tensor:
        source = prompts[: len(pictures)]
        return draw_counterfactuals(
            base, pictures, source, [], editor_run.editor, drift=drift, seed=seed, redraw=True
        ).reconstructions

    redrawn = unchanged(scans) if editor_run.editor.exact else drawn.reconstructions
    once = psnr(drawn.autoencoded, scans).mean() - psnr(redrawn, scans).mean()
    autoencoded = edited = scans[:count]
    for _ in range(cycles):
        autoencoded = base.autoencode(autoencoded)
        edited = unchanged(edited)
    repeated = psnr(autoencoded, scans[:count]).mean() - psnr(edited, scans[:count]).mean()
    return {
        "null_edit_psnr_gap_db": float(once),
        "null_edits_psnr_gap_db": float(repeated),
        "vae_psnr_db": float(psnr(drawn.autoencoded, scans).mean()),
    }


def reversibility(editor_run: EditorRun, data: EvaluationData, drawn: Counterfactuals) -> Metrics:
    """PSNR of the scans against their edits, edited back."""
    if not data.edits:
        return {}
    scans = [edit.scan for edit in data.edits]
    edited = [edit.source | edit.target for edit in data.edits]
    edits = [
        edit_to(data.modality, number, now, edit.source, editor_run.editor.delta)
        for number, (now, edit) in enumerate(zip(edited, data.edits, strict=True))
    ]
    past = past_of(data.modality, {row: ScanHistory.without_visits() for row in range(len(edits))})
    back, _ = editor_run.draw(drawn.images[: len(edits)], edited, edits, past=past)
    return {"reversal_psnr_db": float(psnr(back.images, drawn.autoencoded[scans]).mean())}


def effectiveness(predictors: Predictors, data: EvaluationData, autoencoded: Tensor, images: Tensor) -> Metrics:
    """Share of the requested change of each number that was made, and how often each requested category was reached.

    Args:
        predictors: trained on real images.
        data: the edits.
        autoencoded: baselines `(N,1,S,S)` after the VAE.
        images: of the edits `(M,1,S,S)`, after the VAE.
    """
    metrics: Metrics = {}
    for name in predictors.numbers:
        rows = _rows_of(data, name)
        if not rows:
            continue
        edits = [data.edits[row] for row in rows]
        requested = torch.tensor([float(edit.target[name]) - float(edit.source[name]) for edit in edits])
        before = predictors.number(name, autoencoded[[edit.scan for edit in edits]])
        moved = predictors.number(name, images[rows]) - before
        metrics[f"{name}_moved"] = float((moved * requested).sum() / requested.square().sum())
    for name in predictors.categories:
        rows = _rows_of(data, name)
        if rows:
            predicted = predictors.category(name, list(data.modality.attributes[name].categories), images[rows])
            targets = [data.edits[row].target[name] for row in rows]
            reached = [category == target for category, target in zip(predicted, targets, strict=True)]
            metrics[f"{name}_reached"] = float(np.mean(reached))
    return metrics


def _rows_of(data: EvaluationData, name: str) -> list[int]:
    """Rows of the edits that change this attribute alone."""
    return [row for row, edit in enumerate(data.edits) if set(edit.target) == {name}]
