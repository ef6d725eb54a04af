"""Biomarkers by name, as a modality lists them. Importing this imports no algorithm."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ld_common.core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

BIOMARKERS: Registry[Callable[[Tensor, float], Tensor]] = Registry(
    "biomarker",
    "latent_drift.biomarkers",
    {
        "ventricles": "ld_common.metrics.biomarkers:ventricle_areas_mm2",
        "heart": "ld_common.metrics.biomarkers:heart_areas_mm2",
    },
)
"""Functions of images `(N,1,S,S)` in [-1, 1] and the side of a pixel in mm that return areas `(N,)` in mm2."""

EDGES: Registry[Callable[[Tensor, float], Tensor]] = Registry(
    "structure edge",
    "latent_drift.edges",
    {
        "ventricles": "ld_common.metrics.biomarkers:ventricle_edges_mm",
        "heart": "ld_common.metrics.biomarkers:heart_edges_mm",
    },
)
"""For biomarkers of the same name, functions of the same arguments that return the length of the structure's edge in mm
`(N,)`: how much its area grows when the edge moves outward by a mm. A biomarker may lack one."""
