"""All measures of a release asked through one editor, or of the answers of another method.

What is written is judged, in the pixels of the file (`comparison`) and as a picture (`picture_measures`). Composition
and reversibility (`axioms`) need an editor that can be asked again, and look at its own pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ld_common.diffusion.base_model import BaseModel
from ld_common.editing.counterfactuals import edit_to, past_of
from ld_common.imaging.scan_table import ScanTable
from ld_evaluate.answers import Answers, written_as_files
from ld_evaluate.axioms import EditorRun, Metrics, composition, reversibility
from ld_evaluate.calibration import (
    HISTORY,
    ONE_SCAN,
    TimedErrors,
    bands_section,
    cohort_section,
    history_band,
)
from ld_evaluate.comparison import ComparedMethod, Comparison
from ld_evaluate.dataset import EvaluationData
from ld_evaluate.follow_up import follow_up_metrics
from ld_evaluate.history_data import HistoryData
from ld_evaluate.options import JudgeConfig
from ld_evaluate.picture_measures import PictureMeasures
from ld_evaluate.protocol import compare
from ld_evaluate.ridge_rules import ridge_answers
from ld_evaluate.truth import through_vae

TRUTH_METRICS = ("edit_direction_rate", "growth_ratio", "raw_gain_db", "copy_gain_db", "identity_ratio")
"""Of simulated patients: the mean over the edits' answers or kinds."""


@dataclass(frozen=True, eq=False)
class Judgement:
    """The numbers of one editor or method."""

    metrics: Metrics
    compared: ComparedMethod
    written: Answers
    """In the order of `EvaluationData.asked`."""


class CounterfactualJudge:
    """Measures editors and other methods on one set of scans; what all need is made once."""

    def __init__(
        self, base: BaseModel, data: EvaluationData, reference: ScanTable | None, config: JudgeConfig, seed: int = 0
    ) -> None:
        """Judge the rules, and learn from the real scans.

        Args:
            base: the base without an adapter, for its VAE.
            data: the scans and edits.
            reference: real scans of other patients, on whom the release may have been trained; None leaves out
                effectiveness, realism and the latent divergence.
            config: how much is tried.
            seed: as in `PictureMeasures`.
        """
        self.data, self.config = data, config
        self.counts = {
            "patients": len(data.baselines.patients),
            "follow_ups": len(data.follow_ups),
            "raw_follow_ups": sum(edit.truth is not None and edit.truth.pixels is not None for edit in data.follow_ups),
            "questions": len(data.edits),
            "reference_scans": 0 if reference is None else len(reference.images),
            "reference_patients": 0 if reference is None else len(set(reference.patients)),
        }
        self.measures: PictureMeasures | None = None
        if reference is not None:
            self.measures = PictureMeasures(base, data, reference, config.predictor_steps, seed)
        self.references = {} if self.measures is None else self.measures.references
        ridges: dict[str, Answers] = {}
        if data.visits is not None and any(edit.truth is not None for edit in data.asked):
            ridges = ridge_answers(base, data.modality, data.asked, data.visits, reference)
        self.comparison = Comparison(base, data.modality, data.asked, ridges)
        truths = [edit.truth.picture for edit in data.edits if edit.truth is not None]
        self.of_truth = self._picture_metrics(truths)

    def judge(self, name: str, editor_run: EditorRun, progress: Callable[[int], None] = lambda done: None) -> Judgement:
        """Draw every edit, write it as a file would be, and measure it; `progress` as in `draw_counterfactuals`."""
        data = self.data
        edits = [edit_to(data.modality, e.scan, e.source, e.target, editor_run.editor.delta) for e in data.asked]
        known = past_of(data.modality, {edit.scan: edit.scanned.without_visits(data.modality) for edit in data.asked})
        drawn, samples = editor_run.draw(data.baselines.images, data.baselines.attributes, edits, progress, known)
        judgement = self.judge_answers(
            name, written_as_files(data.modality, data.asked, drawn.reconstructions, samples)
        )
        metrics = composition(editor_run, data, drawn, self.config.cycles, self.config.cycled)
        metrics |= reversibility(editor_run, data, drawn)
        if data.truths:
            edited = replace(drawn, images=drawn.images[: len(data.edits)])
            seen = editor_run.base.autoencode(torch.stack([truth.image for truth in data.truths]))
            metrics |= through_vae(data.baselines.images, data.truths, seen, edited)
        return replace(judgement, metrics=metrics | judgement.metrics)

    def judge_answers(self, name: str, written: Answers) -> Judgement:
        """Measure written answers in the order of `EvaluationData.asked`."""
        data = self.data
        compared = self.comparison.of(name, written)
        pictures = [
            edit.scanned.picture_of(pixels, data.modality)
            for edit, pixels in zip(data.edits, written, strict=False)
            if pixels is not None
        ]
        metrics = self.comparison.headline(compared) | follow_up_metrics(self.comparison, compared)
        metrics |= self._picture_metrics(pictures)
        return Judgement(metrics, compared, written)

    def calibrate(self, judgement: Judgement, editor_run: EditorRun | None = None) -> dict[str, Any]:
        """`bands` around a judgement's answers and the `cohort`'s curves (`calibration`), for enough patients.

        Args:
            judgement: whose answers were measured.
            editor_run: what drew them; it is asked once more, with histories. None leaves that out.
        """
        data = self.data
        bands = {ONE_SCAN: TimedErrors.of(data.modality, data.asked, judgement.compared.patients).band()}
        if editor_run is not None and editor_run.takes_history and data.with_history is not None:
            bands[HISTORY] = self._history_band(editor_run, data.with_history)
        later = [] if data.with_history is None else data.with_history.edits
        return {
            "bands": bands_section(data.modality, bands),
            "cohort": cohort_section(data.modality, [*data.asked, *later]),
        }

    def _history_band(self, editor_run: EditorRun, later: HistoryData) -> dict[str, Any] | None:
        modality = self.data.modality
        edits = [edit_to(modality, e.scan, e.source, e.target, editor_run.editor.delta) for e in later.edits]
        past = past_of(modality, dict(enumerate(later.histories)))
        drawn, samples = editor_run.draw(later.pictures, later.attributes, edits, past=past)
        written = written_as_files(modality, later.edits, drawn.reconstructions, samples)
        answers = compare(HISTORY, modality, later.edits, written)
        spreads = {edit.patient: later.histories[edit.scan].spread for edit in later.edits}
        return history_band(TimedErrors.of(modality, later.edits, answers), list(spreads.values()))

    def _picture_metrics(self, pictures: list[torch.Tensor]) -> Metrics:
        """Measures of pictures `(1,S,S)` that need no truth; empty unless there is one for each edit."""
        edits = self.data.edits
        if not edits or len(pictures) < len(edits):
            return {}
        images, scans = torch.stack(pictures), torch.stack([edit.scanned.picture for edit in edits])
        metrics = {} if self.measures is None else self.measures.of(images)
        return metrics | {"change": float((images - scans).abs().mean() / 2)}
