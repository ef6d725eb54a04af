"""Measures of written answers, as pictures, that real scans of other patients make possible.

effectiveness  attributes that networks read off the picture
realism        distance between features of edited and of real images, beside that of as many real images
minimality     Counterfactual Latent Divergence, and how much changes

Networks and features see pictures after the VAE, so that its traces tell nothing.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import BaseModel
from ld_common.imaging.scan_table import ScanTable
from ld_common.metrics.features import extract_features, load_extractor
from ld_common.metrics.frechet import frechet_distance, kernel_distance
from ld_evaluate.axioms import Metrics, effectiveness
from ld_evaluate.dataset import EvaluationData
from ld_evaluate.minimality import LatentDivergence
from ld_evaluate.predictors import train_predictors

FEATURES = "efficientnet_lite0"


class PictureMeasures:
    """Predictors, features and latents of real scans, made once."""

    def __init__(
        self, base: BaseModel, data: EvaluationData, reference: ScanTable, predictor_steps: int, seed: int
    ) -> None:
        """Train the predictors and extract the features of the real scans.

        Args:
            base: the base without an adapter, for its VAE.
            data: the scans and edits.
            reference: real scans of other patients, on whom the release may have been trained.
            predictor_steps: training steps of each predictor.
            seed: of the predictors, and of the choice of real images that are compared with each other.
        """
        self.base, self.data = base, data
        real = base.autoencode(reference.images)
        self.predictors = train_predictors(data.modality, real, reference.attributes, seed, predictor_steps)
        self.extractor = load_extractor(FEATURES)
        self.real_features = extract_features(self.extractor, real)
        self.divergence = LatentDivergence(base, data.modality, reference)
        self.baselines = base.autoencode(data.baselines.images)
        self.references = self._real_against_real(seed) | self._predictors_on_scans()

    def of(self, pictures: Tensor) -> Metrics:
        """Of the pictures `(M,1,S,S)` of the data's edits."""
        seen = self.base.autoencode(pictures)
        features = extract_features(self.extractor, seen)
        metrics = effectiveness(self.predictors, self.data, self.baselines, seen) | self._distances(features)
        divergence = self.divergence.mean(self.data.edits, pictures)
        return metrics if divergence is None else metrics | {"latent_divergence": divergence}

    def _distances(self, features: Tensor) -> Metrics:
        return {
            "frechet": frechet_distance(features, self.real_features),
            "kernel": kernel_distance(features, self.real_features),
        }

    def _real_against_real(self, seed: int) -> Metrics:
        """The distances of as many real images as there are edits to the rest of them."""
        features = self.real_features
        order = torch.randperm(len(features), generator=torch_generator(seed, "real against real"))
        count = min(len(self.data.edits), len(order) // 2)
        some, rest = features[order[:count]], features[order[count:]]
        return {"frechet": frechet_distance(some, rest), "kernel": kernel_distance(some, rest)}

    def _predictors_on_scans(self) -> Metrics:
        """How well the predictors read the unedited scans, beside the mean or the commonest category."""
        metrics: Metrics = {}
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
