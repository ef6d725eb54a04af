"""Counterfactuals of simulated test patients, drawn, written and measured against the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ld_common.diffusion.base_model import BaseModel
from ld_common.editing.base import EditDrift, Editor
from ld_common.editing.counterfactuals import Counterfactuals, draw_counterfactuals, edit_to
from ld_common.imaging.modality import Modality
from ld_common.metrics.image import psnr
from ld_evaluate.answers import written_as_files
from ld_evaluate.comparison import Comparison
from ld_evaluate.protocol import PatientAnswer
from ld_evaluate.truth import TrueCounterfactual, read_truths, through_vae, validate_area


@dataclass(frozen=True)
class SimulatedEvaluation:
    """Scans of test patients `(N,1,S,S)`, the images drawn of them, and what was measured."""

    truths: list[TrueCounterfactual]
    scans: Tensor
    drawn: Counterfactuals
    """Its images are in the order of `truths`."""
    pictures: Tensor
    """What a file of each answer holds, as a model sees it, `(M,1,S,S)`."""
    answers: list[PatientAnswer]
    """The editor's, in the order of `truths`."""
    rows: list[dict[str, Any]]
    """Each answer of the editor and of the rules to each patient's edit."""
    summary: dict[str, Any]


@dataclass(frozen=True)
class Truths:
    """Where the test patients are."""

    folder: Path
    """With `held_out.json`."""


def evaluate(
    base: BaseModel,
    modality: Modality,
    truths: Truths,
    editor: Editor,
    drift: EditDrift | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> SimulatedEvaluation:
    """Draw, write and measure every true counterfactual of a folder.

    Args:
        base: the base with the release's adapter.
        modality: the release's.
        truths: the test patients.
        editor: draws the counterfactuals.
        drift: the adapter's, if it was trained with one.
        progress: as in `draw_counterfactuals`.
    """
    scans, counterfactuals = read_truths(truths.folder, modality, base.resolution)
    asked = [truth.question(modality) for truth in counterfactuals]
    prompts = {edit.scan: modality.prompt(edit.source) for edit in asked}
    edits = [edit_to(modality, edit.scan, edit.source, edit.target, editor.delta) for edit in asked]
    source = [prompts[row] for row in range(len(scans))]
    drawn = draw_counterfactuals(base, scans, source, edits, editor, progress, drift)
    written = written_as_files(modality, asked, drawn.reconstructions, drawn.images[:, None])
    comparison = Comparison(base, modality, asked)
    method = comparison.of(editor.name, written)
    answers = [*method.patients, *(row for rule in comparison.rules.values() for row in rule.patients)]
    summary: dict[str, Any] = comparison.headline(method) | through_vae(base, scans, counterfactuals, drawn)
    summary["by_edit"] = method.by_edit
    summary["rules"] = comparison.rule_numbers()
    summary["inversion_psnr_db"] = float(psnr(drawn.reconstructions, drawn.autoencoded).mean())
    summary["vae_psnr_db"] = float(psnr(drawn.autoencoded, scans).mean())
    summary["area_validation"] = validate_area(modality, scans, counterfactuals)
    rows = [answer.row() for answer in answers]
    pairs = zip(asked, written, strict=True)
    pictures = torch.stack([edit.scanned.picture_of(pixels, modality) for edit, pixels in pairs])
    return SimulatedEvaluation(counterfactuals, scans, drawn, pictures, method.patients, rows, summary)
