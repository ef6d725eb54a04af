"""All measures of one release asked through one editor.

Beside the axioms (`axioms`) and the prediction of follow-ups (`follow_up`):

minimality     how much changes, and how much of it outside the region that truly changes
realism        distance between features of edited and of real images, beside that of as many real images
truth          for simulated patients, the distance to the true counterfactual

Every image that is compared passed the VAE, true counterfactuals and follow-ups included: its losses are no editor's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import BaseModel
from ld_common.editing.counterfactuals import Counterfactuals, edit_to
from ld_common.imaging.scan_table import ScanTable
from ld_common.metrics.features import extract_features, load_extractor
from ld_common.metrics.frechet import frechet_distance, kernel_distance
from ld_evaluate.axioms import EditorRun, Metrics, composition, effectiveness, reversibility
from ld_evaluate.bootstrap import bootstrap_interval
from ld_evaluate.dataset import EvaluationData
from ld_evaluate.follow_up import follow_up_metrics
from ld_evaluate.options import JudgeConfig
from ld_evaluate.predictors import Predictors, train_predictors
from ld_evaluate.truth import measure, summarize

FEATURES = "efficientnet_lite0"
TRUTH_METRICS = ("edit_direction_rate", "growth_ratio", "growth_correlation", "copy_gain_db", "identity_ratio")


@dataclass(frozen=True, eq=False)
class Judgement:
    """The numbers of one editor, and the images it drew."""

    metrics: Metrics
    by_edit: dict[str, dict[str, float]]
    """Means by the name of the edit, for simulated patients."""
    drawn: Counterfactuals
    """Images of the data's edits, then of the predicted follow-ups."""


class CounterfactualJudge:
    """Measures editors on one set of scans; predictors and features of real images are made once."""

    def __init__(
        self, base: BaseModel, data: EvaluationData, reference: ScanTable | None, config: JudgeConfig, seed: int = 0
    ) -> None:
        """Train the predictors and extract the features of real images.

        Args:
            base: the base without an adapter, for its VAE.
            data: the scans and edits.
            reference: real scans of other patients, on whom the release may have been trained; None leaves out
                effectiveness and realism.
            config: how much is tried.
            seed: of the predictors, and of the choice of real images that are compared with each other.
        """
        self.data, self.config = data, config
        self.counts = {
            "patients": len(data.baselines.patients),
            "follow_ups": len(data.owners),
            "questions": len(data.edits),
            "reference_scans": 0 if reference is None else len(reference.images),
            "reference_patients": 0 if reference is None else len(set(reference.patients)),
        }
        self.predictors, self.real_features = Predictors({}, {}), torch.empty(0)
        if reference is not None:
            real = base.autoencode(reference.images)
            self.predictors = train_predictors(data.modality, real, reference.attributes, seed, config.predictor_steps)
            self.extractor = load_extractor(FEATURES)
            self.real_features = extract_features(self.extractor, real)
        self.later = base.autoencode(data.follow_ups.images) if data.owners else data.follow_ups.images
        self.baselines = base.autoencode(data.baselines.images)
        self.references = self._references(seed)

    def judge(self, editor_run: EditorRun, progress: Callable[[int], None] = lambda done: None) -> Judgement:
        """Draw every edit and measure the images; `progress` as in `draw_counterfactuals`."""
        data, config = self.data, self.config
        attributes, delta = data.baselines.attributes, editor_run.editor.delta
        edits = [edit_to(data.modality, edit.scan, attributes[edit.scan], edit.target, delta) for edit in data.edits]
        follow_ups = zip(data.owners, data.follow_ups.attributes, strict=True)
        edits += [edit_to(data.modality, owner, attributes[owner], later, delta) for owner, later in follow_ups]
        drawn = editor_run.draw(data.baselines.images, attributes, edits, progress)
        images, predicted = drawn.images[: len(data.edits)], drawn.images[len(data.edits) :]
        metrics = composition(editor_run, data, drawn, config.cycles, config.cycled)
        metrics |= reversibility(editor_run, data, drawn, config.cycled)
        metrics |= effectiveness(self.predictors, data, self.baselines, images)
        owners = torch.tensor([edit.scan for edit in data.edits])
        metrics["change"] = float((images - drawn.reconstructions[owners]).abs().mean() / 2)
        metrics |= self._realism(images)
        metrics |= follow_up_metrics(data.modality, predicted, self.baselines[data.owners], self.later)
        truth_metrics, by_edit = self._truth(editor_run, drawn, images)
        return Judgement(metrics | truth_metrics, by_edit, drawn)

    def _realism(self, images: Tensor) -> Metrics:
        if not len(self.real_features):
            return {}
        features = extract_features(self.extractor, images)
        return {
            "frechet": frechet_distance(features, self.real_features),
            "kernel": kernel_distance(features, self.real_features),
        }

    def _truth(
        self, editor_run: EditorRun, drawn: Counterfactuals, images: Tensor
    ) -> tuple[Metrics, dict[str, dict[str, float]]]:
        """Measures against the true counterfactuals, and their means by edit; empty where none is known."""
        data = self.data
        if not data.truths:
            return {}, {}
        edited = Counterfactuals(drawn.autoencoded, drawn.reconstructions, images)
        rows = measure(editor_run.base, data.modality, data.baselines.images, data.truths, edited)
        summary = summarize(rows, growth_ceiling=1.0)
        metrics: Metrics = {key: float(summary[key]) for key in TRUTH_METRICS if np.isfinite(summary[key])}
        patients = np.array([f"{truth.hospital}/{truth.patient}" for truth in data.truths])
        metrics |= bootstrap_interval("copy_gain_db", patients, np.array([row["copy_gain_db"] for row in rows]))
        return metrics, summary["by_edit"]

    def _references(self, seed: int) -> Metrics:
        """The same measures on real images; empty without reference scans."""
        if not len(self.real_features):
            return {}
        order = torch.randperm(len(self.real_features), generator=torch_generator(seed, "real against real"))
        subset = order[: min(len(self.data.edits), len(order) // 2)]
        rest = order[len(subset) :]
        metrics: Metrics = {
            "frechet": frechet_distance(self.real_features[subset], self.real_features[rest]),
            "kernel": kernel_distance(self.real_features[subset], self.real_features[rest]),
        }
        attributes = self.data.baselines.attributes
        for name in self.predictors.numbers:
            predicted = self.predictors.number(name, self.baselines)
            true = torch.tensor([float(values[name]) for values in attributes])
            metrics[f"{name}_error"] = float((predicted - true).abs().mean())
            metrics[f"{name}_error_by_chance"] = float((true - self.predictors.numbers[name][1]).abs().mean())
        for name in self.predictors.categories:
            known = list(self.data.modality.attributes[name].categories)
            categories = self.predictors.category(name, known, self.baselines)
            right = [category == values[name] for category, values in zip(categories, attributes, strict=True)]
            metrics[f"{name}_right"] = float(np.mean(right))
            counts = Counter(values[name] for values in attributes)
            metrics[f"{name}_right_by_chance"] = max(counts.values()) / len(right)
        return metrics
