"""Counterfactuals of simulated test patients, drawn and measured against the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ld_common.diffusion.base_model import BaseModel
from ld_common.diffusion.drift import LatentDrift
from ld_common.editing.base import Editor
from ld_common.editing.counterfactuals import Counterfactuals, draw_counterfactuals, edit_to
from ld_common.imaging.modality import Modality
from ld_common.metrics.image import psnr
from ld_evaluate.truth import TrueCounterfactual, measure, read_truths, summarize, validate_area


@dataclass(frozen=True)
class SimulatedEvaluation:
    """Scans of test patients `(N,1,S,S)`, the images drawn of them, and what was measured."""

    truths: list[TrueCounterfactual]
    scans: Tensor
    drawn: Counterfactuals
    """Its images are in the order of `truths`."""
    rows: list[dict[str, Any]]
    """Numbers of each true counterfactual."""
    summary: dict[str, Any]


@dataclass(frozen=True)
class Truths:
    """Where the test patients are, and what the best prediction could reach."""

    folder: Path
    """With `held_out.json`."""
    growth_ceiling: float = 1.0
    """Growth correlation of the best prediction from one image, by the causal model."""


def evaluate(
    base: BaseModel,
    modality: Modality,
    truths: Truths,
    editor: Editor,
    drift: LatentDrift | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> SimulatedEvaluation:
    """Draw and measure every true counterfactual of a folder.

    Args:
        base: the base with the release's adapter.
        modality: the release's.
        truths: the test patients.
        editor: draws the counterfactuals.
        drift: the adapter's, if it was trained with one.
        progress: as in `draw_counterfactuals`.
    """
    scans, counterfactuals = read_truths(truths.folder, modality, base.resolution)
    prompts = {truth.scan: modality.prompt(truth.attributes) for truth in counterfactuals}
    edits = [edit_to(modality, truth.scan, truth.attributes, truth.target, editor.delta) for truth in counterfactuals]
    source = [prompts[row] for row in range(len(scans))]
    drawn = draw_counterfactuals(base, scans, source, edits, editor, progress, drift)
    rows = measure(base, modality, scans, counterfactuals, drawn)
    summary = summarize(rows, truths.growth_ceiling)
    summary["inversion_psnr_db"] = float(psnr(drawn.reconstructions, drawn.autoencoded).mean())
    summary["vae_psnr_db"] = float(psnr(drawn.autoencoded, scans).mean())
    summary["area_validation"] = validate_area(modality, scans, counterfactuals)
    return SimulatedEvaluation(counterfactuals, scans, drawn, rows, summary)
