"""All measures of a release asked through one editor, or of the answers of another method.

What is written is judged, in the pixels of the file (`comparison`) and as a picture (`picture_measures`). Composition
and reversibility (`axioms`) need an editor that can be asked again, and look at its own pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ld_common.diffusion.base_model import BaseModel
from ld_common.editing.counterfactuals import edit_to
from ld_common.imaging.scan_table import ScanTable
from ld_evaluate.answers import Answers, written_as_files
from ld_evaluate.axioms import EditorRun, Metrics, composition, reversibility
from ld_evaluate.comparison import ComparedMethod, Comparison
from ld_evaluate.dataset import EvaluationData
from ld_evaluate.follow_up import follow_up_metrics
from ld_evaluate.options import JudgeConfig
from ld_evaluate.picture_measures import PictureMeasures
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
        self.comparison = Comparison(base, data.modality, data.asked)
        truths = [edit.truth.picture for edit in data.edits if edit.truth is not None]
        self.of_truth = self._picture_metrics(truths)

    def judge(self, name: str, editor_run: EditorRun, progress: Callable[[int], None] = lambda done: None) -> Judgement:
        """Draw every edit, write it as a file would be, and measure it; `progress` as in `draw_counterfactuals`."""
        data = self.data
        edits = [edit_to(data.modality, e.scan, e.source, e.target, editor_run.editor.delta) for e in data.asked]
        drawn, samples = editor_run.draw(data.baselines.images, data.baselines.attributes, edits, progress)
        judgement = self.judge_answers(
            name, written_as_files(data.modality, data.asked, drawn.reconstructions, samples)
        )
        metrics = composition(editor_run, data, drawn, self.config.cycles, self.config.cycled)
        metrics |= reversibility(editor_run, data, drawn)
        if data.truths:
            edited = replace(drawn, images=drawn.images[: len(data.edits)])
            metrics |= through_vae(editor_run.base, data.baselines.images, data.truths, edited)
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

    def _picture_metrics(self, pictures: list[torch.Tensor]) -> Metrics:
        """Measures of pictures `(1,S,S)` that need no truth; empty unless there is one for each edit."""
        edits = self.data.edits
        if not edits or len(pictures) < len(edits):
            return {}
        images, scans = torch.stack(pictures), torch.stack([edit.scanned.picture for edit in edits])
        metrics = {} if self.measures is None else self.measures.of(images)
        return metrics | {"change": float((images - scans).abs().mean() / 2)}
