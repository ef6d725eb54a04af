"""Minimality as Counterfactual Latent Divergence (CLD; benchmark of arXiv 2403.19629), in the latents of the VAE.

A counterfactual shall move at least as far as the scan's own kind spreads, and less far than to most real scans of the
target kind:

    CLD = log(0.8 exp(p1) + 0.2 exp(p2)),  p1 = P(S_cf <= div),  p2 = P(S_f >= div)

div is the distance from the scan to its counterfactual; S_cf are the distances from the scan to real scans with the
attribute that is asked for, S_f those to real scans with its own. It lies between 0 and 1; lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ld_common.diffusion.base_model import BaseModel
from ld_common.imaging.modality import Modality, Value
from ld_common.imaging.scan_table import ScanTable
from ld_evaluate.edits import EvaluationEdit

TARGET_WEIGHT, SOURCE_WEIGHT = 0.8, 0.2
NEAR = 0.05
"""Share of an attribute's range within which two numbers count as the same."""
ENCODED_TOGETHER = 64


class LatentDivergence:
    """CLD of answers to the edits of one attribute, against real scans of other patients."""

    def __init__(self, base: BaseModel, modality: Modality, reference: ScanTable) -> None:
        """Encode the reference scans with the base's VAE."""
        self.base, self.modality = base, modality
        self.attributes = reference.attributes
        self.latents = self._encode(reference.images)

    def mean(self, edits: Sequence[EvaluationEdit], pictures: Tensor) -> float | None:
        """Mean CLD of pictures `(M,1,S,S)` in the order of the edits; None where no edit has both kinds of scan."""
        after = self._encode(pictures)
        values = [self._of(edit, latent) for edit, latent in zip(edits, after, strict=True)]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    def _of(self, edit: EvaluationEdit, latent: Tensor) -> float | None:
        if len(edit.target) != 1:
            return None
        ((name, target),) = edit.target.items()
        before = self._encode(edit.scanned.picture[None])[0]
        distances = (self.latents - before).norm(dim=1)
        to_target, to_source = (distances[self._with(name, value)] for value in (target, edit.source[name]))
        if not len(to_target) or not len(to_source):
            return None
        return divergence(float((latent - before).norm()), to_target, to_source)

    def _with(self, name: str, value: Value) -> Tensor:
        """Which reference scans `(N,)` show a value of an attribute."""
        if isinstance(value, str):
            return torch.tensor([values[name] == value for values in self.attributes])
        attribute = self.modality.attributes[name]
        near = NEAR * (attribute.maximum - attribute.minimum)
        return torch.tensor([abs(float(values[name]) - value) <= near for values in self.attributes])

    def _encode(self, pictures: Tensor) -> Tensor:
        """Latents `(N,C*h*w)` of pictures `(N,1,S,S)`."""
        return torch.cat([self.base.encode(part).flatten(1).cpu() for part in pictures.split(ENCODED_TOGETHER)]).float()


def divergence(div: float, to_target: Tensor, to_source: Tensor) -> float:
    """CLD of one counterfactual at distance `div`, from distances to real scans `(A,)` and `(B,)`."""
    nearer = float((to_target <= div).float().mean())
    farther = float((to_source >= div).float().mean())
    return math.log(TARGET_WEIGHT * math.exp(nearer) + SOURCE_WEIGHT * math.exp(farther))
