"""Counterfactuals of simulated test patients, drawn, written and measured against the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ld_common.diffusion.base_model import BaseModel
from ld_common.editing.base import EditDrift, Editor
from ld_common.editing.counterfactuals import Counterfactuals, Edit, draw_counterfactuals, edit_to, past_of
from ld_common.imaging.modality import Modality
from ld_common.metrics.image import psnr
from ld_evaluate.answers import written_as_files
from ld_evaluate.calibration import HISTORY, TimedErrors, bands_section, cohort_section, history_band
from ld_evaluate.calibration import ONE_SCAN as ONE_SCAN_BAND
from ld_evaluate.comparison import Comparison
from ld_evaluate.edits import EvaluationEdit
from ld_evaluate.files import LAST_VISITS
from ld_evaluate.protocol import PatientAnswer
from ld_evaluate.public import public_evaluation
from ld_evaluate.truth import TrueCounterfactual, read_earlier, read_truths, through_vae, validate_area

ONE_SCAN, ALL_VISITS = "this release, last scan", "this release, all visits"


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
    asked, source, edits = _asked(modality, counterfactuals, len(scans), editor)
    known = past_of(modality, {edit.scan: edit.scanned.without_visits(modality) for edit in asked})
    drawn = draw_counterfactuals(base, scans, source, edits, editor, progress, drift, past=known)
    written = written_as_files(modality, asked, drawn.reconstructions, drawn.images[:, None])
    comparison = Comparison(base, modality, asked)
    method = comparison.of(editor.name, written)
    answers = [*method.patients, *(row for rule in comparison.rules.values() for row in rule.patients)]
    summary: dict[str, Any] = comparison.headline(method) | through_vae(base, scans, counterfactuals, drawn)
    summary["by_edit"] = method.by_edit
    summary["rules"] = comparison.rule_numbers()
    counts = {"patients": len(scans)}
    run = {"editor": editor.name, "biomarkers": modality.biomarkers, "by_edit": method.by_edit, "counts": counts}
    history = evaluate_history(base, modality, truths, editor, drift)
    bands = {ONE_SCAN_BAND: TimedErrors.of(modality, asked, method.patients).band(), HISTORY: history.band}
    run |= {"bands": bands_section(modality, bands), "cohort": cohort_section(modality, asked)}
    summary["public"] = public_evaluation(run | {"metrics": {}}, asked)
    summary["with_history"] = history.numbers
    summary["inversion_psnr_db"] = float(psnr(drawn.reconstructions, drawn.autoencoded).mean())
    summary["vae_psnr_db"] = float(psnr(drawn.autoencoded, scans).mean())
    summary["area_validation"] = validate_area(modality, scans, counterfactuals)
    rows = [answer.row() for answer in answers]
    pairs = zip(asked, written, strict=True)
    pictures = torch.stack([edit.scanned.picture_of(pixels, modality) for edit, pixels in pairs])
    return SimulatedEvaluation(counterfactuals, scans, drawn, pictures, method.patients, rows, summary)


@dataclass(frozen=True)
class HistoryEvaluation:
    """What answers with a history are worth; empty where no test patient has three visits, or the editor takes none."""

    numbers: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """By row and kind of edit, the rules among them."""
    band: dict[str, Any] | None = None
    """As `ld_evaluate.calibration.history_band`."""


def evaluate_history(
    base: BaseModel, modality: Modality, truths: Truths, editor: Editor, drift: EditDrift | None
) -> HistoryEvaluation:
    """Answers to what comes after a patient's last visit, from that scan alone and with the visits before it."""
    scans, counterfactuals = read_truths(truths.folder, modality, base.resolution, LAST_VISITS)
    if not len(scans) or not editor.takes_move:
        return HistoryEvaluation()
    asked, source, edits = _asked(modality, counterfactuals, len(scans), editor)
    histories = read_earlier(truths.folder, modality, base.resolution)
    past = past_of(modality, dict(enumerate(histories)))
    known = past_of(modality, {edit.scan: edit.scanned.without_visits(modality) for edit in asked})
    comparison, rows = Comparison(base, modality, asked), {}
    for title, visits in ((ONE_SCAN, known), (ALL_VISITS, past)):
        drawn = draw_counterfactuals(base, scans, source, edits, editor, drift=drift, past=visits)
        written = written_as_files(modality, asked, drawn.reconstructions, drawn.images[:, None])
        method = comparison.of(title, written)
        rows[title] = method.by_edit
    band = history_band(TimedErrors.of(modality, asked, method.patients), [history.spread for history in histories])
    return HistoryEvaluation({**comparison.rule_numbers(), **rows}, band)


def _asked(
    modality: Modality, counterfactuals: list[TrueCounterfactual], scans: int, editor: Editor
) -> tuple[list[EvaluationEdit], list[str], list[Edit]]:
    """The edits with their truths, each scan's prompt, and the edits as they are drawn."""
    asked = [truth.question(modality) for truth in counterfactuals]
    prompts = {edit.scan: modality.prompt(edit.source) for edit in asked}
    edits = [edit_to(modality, edit.scan, edit.source, edit.target, editor.delta) for edit in asked]
    return asked, [prompts[row] for row in range(scans)], edits
