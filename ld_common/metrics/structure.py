"""The structure that a modality measures first, in the model's pictures: how large it is, and how long its edge."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ld_common.imaging.modality import Modality
from ld_common.metrics.registry import BIOMARKERS, EDGES

Measure = Callable[[Tensor], Tensor]
"""From pictures `(N,1,S,S)` to numbers `(N,)`."""


def area_of(modality: Modality) -> Measure | None:
    """Area of the modality's first biomarker as a share of the picture.

    None where there is none, or where pictures show different fields of view, so that shares do not compare.
    """
    if not modality.biomarkers or not modality.image.field_of_view_mm > 0:
        return None
    measure, side_mm = BIOMARKERS.load(modality.biomarkers[0]), modality.image.field_of_view_mm
    return lambda pictures: measure(pictures, side_mm / pictures.shape[-1]) / side_mm**2


def edge_of(modality: Modality) -> Measure | None:
    """Length of that structure's edge as a share of the picture's side; 1 where the biomarker has no such measure."""
    if area_of(modality) is None:
        return None
    if modality.biomarkers[0] not in EDGES:
        return lambda pictures: torch.ones(len(pictures))
    measure, side_mm = EDGES.load(modality.biomarkers[0]), modality.image.field_of_view_mm
    return lambda pictures: measure(pictures, side_mm / pictures.shape[-1]) / side_mm


def structure_sizes(modality: Modality, pictures: Tensor) -> Tensor | None:
    """Areas and edges of pictures `(N,1,S,S)`, `(2,N)` float64; None where the modality measures nothing."""
    area, edge = area_of(modality), edge_of(modality)
    if area is None or edge is None:
        return None
    return torch.stack([area(pictures).double(), edge(pictures).double()])
