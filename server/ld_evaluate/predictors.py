"""Small networks that read attributes off images: do edited images show the requested attributes?

They are trained on real scans of patients who are not edited. Their training images passed the VAE, so that traces of
the VAE in edited images carry no information.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ld_common.imaging.modality import Attributes, Modality
from ld_evaluate.attribute_classifier import AttributeClassifier, score, train_classifier, train_regressor


@dataclass(frozen=True, eq=False)
class Predictors:
    """A network for each number, and one for each category of an attribute beyond its first."""

    numbers: dict[str, tuple[AttributeClassifier, float, float]]
    """The network, and the mean and standard deviation that scale its output."""
    categories: dict[str, dict[str, AttributeClassifier]]

    def number(self, name: str, images: Tensor) -> Tensor:
        """The attribute `(N,)` that images `(N,1,S,S)` show, in its unit."""
        network, mean, deviation = self.numbers[name]
        return mean + deviation * score(network, images)

    def category(self, name: str, known: Sequence[str], images: Tensor) -> list[str]:
        """The likeliest of the `known` categories for each image."""
        odds = [torch.zeros(len(images)), *(score(network, images) for network in self.categories[name].values())]
        return [known[int(row)] for row in torch.stack(odds).argmax(0)]


def train_predictors(
    modality: Modality, images: Tensor, attributes: Sequence[Attributes], seed: int, steps: int
) -> Predictors:
    """Train on images `(N,1,S,S)` and their attributes; an attribute that does not vary among them has no predictor."""
    numbers: dict[str, tuple[AttributeClassifier, float, float]] = {}
    categories: dict[str, dict[str, AttributeClassifier]] = {}
    for name, attribute in modality.attributes.items():
        if attribute.categories:
            labels_of = {
                category: torch.tensor([row[name] == category for row in attributes])
                for category in list(attribute.categories)[1:]
            }
            if all(0 < int(labels.sum()) < len(labels) for labels in labels_of.values()):
                categories[name] = {
                    category: train_classifier(images, labels, seed, steps) for category, labels in labels_of.items()
                }
            continue
        values = torch.tensor([float(row[name]) for row in attributes])
        mean, deviation = float(values.mean()), float(values.std())
        if deviation > 0:
            numbers[name] = train_regressor(images, (values - mean) / deviation, seed, steps), mean, deviation
    return Predictors(numbers, categories)
