"""Metrics of a set of samples against real images of the same attributes, in brightness and beyond it.

Real images passed the base's VAE: a perfect diffusion model would draw these. The loss of the VAE itself is the same in
every row of the table; it is reported once, as a reference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ld_common.adapters.state_dict import read_tensors, write_tensors
from ld_common.core.state import State
from ld_common.imaging.modality import Modality
from ld_common.metrics.features import FeatureExtractor, extract_features, load_extractor
from ld_common.metrics.frechet import frechet_distance, kernel_distance
from ld_common.metrics.histogram import (
    background_error,
    background_mask,
    condition_regression,
    histogram_match,
    sharpness,
    size_slope,
)
from ld_common.metrics.registry import BIOMARKERS
from ld_evaluate.attribute_classifier import AttributeClassifier, auc, score, train_classifier
from ld_simulations.benchmarks.latent_drift.pictures import PictureSet
from ld_simulations.benchmarks.latent_drift.plan import BenchmarkConfig
from ld_simulations.phantoms.base import Phantom

Metrics = dict[str, float]
SIZE_RANGE = (0.01, 0.99)
"""Quantiles of real sizes between which a size counts as anatomically possible."""


class SampleJudge:
    """Real images of one modality, and what is measured on them once."""

    def __init__(
        self,
        modality: Modality,
        phantom: Phantom[Any, Any],
        train: PictureSet,
        test: PictureSet,
        config: BenchmarkConfig,
        folder: Path,
    ) -> None:
        self.phantom, self.train, self.test = phantom, train, test
        self.pixel_mm = modality.image.field_of_view_mm / test.images.shape[-1]
        self.steps, self.device, self.folder = config.classifier_steps, config.device, folder
        weights = Path(config.inception) if config.inception else None
        names = [*config.features, *(["inception"] if weights else [])]
        self.extractors = [load_extractor(name, config.device, weights) for name in names]
        matched = self._matched(test.images)
        self.real, self.real_matched = (
            {
                extractor.name: self._features(extractor, images, f"{extractor.name}-{kind}")
                for extractor in self.extractors
            }
            for kind, images in (("plain", test.images), ("matched", matched))
        )
        self.mask = background_mask(test.images)
        sizes = self._cached("sizes", lambda: {"sizes": self._sizes(test.images)})["sizes"]
        self.expected = condition_regression(sizes, self._design(test))
        self.size_range = torch.quantile(self._beside_expected(sizes, test), torch.tensor(SIZE_RANGE).double())
        self._real_classifiers: dict[int, Any] = {}

    def _cached(self, name: str, compute: Callable[[], State]) -> State:
        """Tensors of real images, computed once for all processes."""
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            write_tensors(file, compute(), {})
        return read_tensors(file)[0]

    def _features(self, extractor: FeatureExtractor, images: Tensor, name: str) -> Tensor:
        return self._cached(name, lambda: {"features": extract_features(extractor, images)})["features"]

    def _matched(self, images: Tensor) -> Tensor:
        return histogram_match(images.to(self.device), self.train.images).cpu()

    def prepare(self, seed: int) -> None:
        """Train the classifier of real images, which every process then reads."""
        self._classifier(seed)

    def measure(self, samples: PictureSet, seed: int) -> Metrics:
        """All metrics of samples `(N,1,S,S)`; `seed` is that of the classifiers."""
        metrics = self._distances(samples.images, self.real, self.real_matched)
        metrics["background_error"] = float(background_error(samples.images, self.test.images, self.mask).mean())
        metrics["sharpness_ratio"] = float(sharpness(samples.images).mean() / sharpness(self.test.images).mean())
        predicted = self.expected.predict(self._design(samples))
        sizes = self._sizes(samples.images)
        metrics["size_slope"] = size_slope(sizes, predicted)
        metrics["size_in_range"] = self._in_range(sizes, samples)
        metrics["condition_auc"] = auc(score(self._classifier(seed), samples.images), self._ill(samples))
        metrics["auc_real"] = auc(score(self._classifier(seed), self.test.images), self._ill(self.test))
        metrics |= self._usefulness(samples, seed)
        return metrics

    def brightness_and_distances(self, images: Tensor) -> Metrics:
        """Mean grey level of the background of `(N,1,S,S)`, 0 black to 255 white, and the distances to real images."""
        background = 127.5 * (images[:, 0, self.mask].mean().item() + 1)
        return {"background_grey": background} | self._distances(images, self.real, self.real_matched)

    def _beside_expected(self, sizes: Tensor, pictures: PictureSet) -> Tensor:
        return sizes.double().cpu() - self.expected.predict(self._design(pictures))

    def _in_range(self, sizes: Tensor, samples: PictureSet) -> float:
        """Share of samples whose size is possible for their attributes."""
        (low, high), beside = self.size_range, self._beside_expected(sizes, samples)
        return float(((beside >= low) & (beside <= high)).double().mean())

    def _distances(self, images: Tensor, real: dict[str, Tensor], real_matched: dict[str, Tensor]) -> Metrics:
        metrics: Metrics = {}
        matched = self._matched(images)
        for extractor in self.extractors:
            name = extractor.name
            features, matched_features = extract_features(extractor, images), extract_features(extractor, matched)
            metrics[f"frechet_{name}"] = frechet_distance(features, real[name])
            metrics[f"kernel_{name}"] = kernel_distance(features.to(self.device), real[name].to(self.device))
            metrics[f"frechet_matched_{name}"] = frechet_distance(matched_features, real_matched[name])
        return metrics

    def _usefulness(self, samples: PictureSet, seed: int) -> Metrics:
        """AUC on real test images of classifiers trained on samples, and on samples and real images."""
        together = torch.cat([samples.images, self.train.images])
        labels = torch.cat([self._ill(samples), self._ill(self.train)])
        sets = {"auc_synthetic": (samples.images, self._ill(samples)), "auc_real_and_synthetic": (together, labels)}
        metrics = {}
        for name, (images, ill) in sets.items():
            model = train_classifier(images, ill, seed, self.steps, self.device)
            metrics[name] = auc(score(model, self.test.images), self._ill(self.test))
        return metrics

    def _classifier(self, seed: int) -> AttributeClassifier:
        """The classifier of the disease, trained on real images."""
        if seed not in self._real_classifiers:
            images, ill = self.train.images, self._ill(self.train)

            def train() -> State:
                return dict(train_classifier(images, ill, seed, self.steps, self.device).cpu().state_dict())

            model = AttributeClassifier()
            model.load_state_dict(self._cached(f"classifier-{seed}", train))
            self._real_classifiers[seed] = model.to(self.device).eval()
        return self._real_classifiers[seed]

    def _ill(self, pictures: PictureSet) -> Tensor:
        return pictures.labels("diagnosis", self.phantom.disease)

    def _sizes(self, images: Tensor) -> Tensor:
        return BIOMARKERS.load(self.phantom.biomarker)(images, self.pixel_mm)

    def _design(self, pictures: PictureSet) -> Tensor:
        """Age in years, disease and sex of each image, `(N,3)`."""
        ages = torch.tensor([float(attributes["age"]) for attributes in pictures.attributes])
        return torch.stack([ages, self._ill(pictures).float(), pictures.labels("sex", "F").float()], 1)
