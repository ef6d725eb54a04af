"""Do edited pictures show what was asked for? Small networks that read the attributes off real pictures say so.

They learn from patients who are not edited, on pictures that went through the VAE, so that what the VAE leaves on every
answer tells them nothing.
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
    """One network a number, one a word beyond an attribute's first."""

    numbers: dict[str, tuple[AttributeClassifier, float, float]]
    """With the mean and deviation that its output is relative to."""
    words: dict[str, dict[str, AttributeClassifier]]

    def number(self, name: str, images: Tensor) -> Tensor:
        """The attribute `(N,)` that pictures `(N,1,S,S)` show, in its unit."""
        network, mean, deviation = self.numbers[name]
        return mean + deviation * score(network, images)

    def word(self, name: str, known: Sequence[str], images: Tensor) -> list[str]:
        """The likeliest of an attribute's words for each picture."""
        odds = [torch.zeros(len(images)), *(score(network, images) for network in self.words[name].values())]
        return [known[int(row)] for row in torch.stack(odds).argmax(0)]


def train_predictors(
    modality: Modality, images: Tensor, attributes: Sequence[Attributes], seed: int, steps: int
) -> Predictors:
    """Train on pictures `(N,1,S,S)` and what they show; an attribute that does not vary among them has no predictor."""
    numbers: dict[str, tuple[AttributeClassifier, float, float]] = {}
    words: dict[str, dict[str, AttributeClassifier]] = {}
    for name, known in modality.attributes.items():
        if known.categories:
            found = {
                word: torch.tensor([own[name] == word for own in attributes]) for word in list(known.categories)[1:]
            }
            if all(0 < int(labels.sum()) < len(labels) for labels in found.values()):
                words[name] = {word: train_classifier(images, labels, seed, steps) for word, labels in found.items()}
            continue
        values = torch.tensor([float(own[name]) for own in attributes])
        mean, deviation = float(values.mean()), float(values.std())
        if deviation > 0:
            numbers[name] = train_regressor(images, (values - mean) / deviation, seed, steps), mean, deviation
    return Predictors(numbers, words)
