"""Distances of sets of pictures to held-out patients' pictures, each also without every held-out patient in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ld_common.metrics.features import extract_features, load_extractor
from ld_common.metrics.frechet import frechet_distance, kernel_distance
from ld_common.metrics.histogram import histogram_match
from ld_simulations.benchmarks.real_latents.pictures import SourcedPictures
from ld_simulations.benchmarks.real_latents.rows import METRICS
from ld_simulations.benchmarks.real_latents.statistics import jackknife_variance, leave_one_out

DISTANCES: Mapping[str, tuple[str, Callable[[Tensor, Tensor], float]]] = {
    "frechet": ("efficientnet", frechet_distance),
    "kernel": ("efficientnet", kernel_distance),
    "frechet_matched": ("efficientnet_matched", frechet_distance),
    "frechet_gabor": ("gabor", frechet_distance),
}
"""Features and distance of each metric."""


class HeldOutJudge:
    """Held-out patients' pictures, which all sets are compared with."""

    def __init__(self, held_out: SourcedPictures, training: Tensor) -> None:
        """Take the features of the pictures.

        Args:
            held_out: grey pictures `(N,1,S,S)` and their patients.
            training: grey pictures of other patients, whose grey levels both sides get for `frechet_matched`.
        """
        self._held_out, self._levels = held_out, training
        self._efficientnet, self._gabor = (load_extractor(name) for name in ("efficientnet_lite0", "gabor"))
        self._real = self._features(held_out.pictures)

    def measure(self, pictures: Tensor, sources: list[str] | None = None) -> dict[str, Any]:
        """Metrics of pictures `(N,1,S,S)`; with `sources`, the variance over these as well.

        Returns:
            By metric `value`, `left_out` (without each held-out patient) and `own_variance`; `grey`, the mean level
            minus that of the held-out pictures, of 255.
        """
        own = self._features(pictures)
        grey = 127.5 * float(pictures.mean() - self._held_out.pictures.mean())
        return {"grey": grey} | {name: self._distance(name, own, sources) for name in METRICS}

    def _distance(self, name: str, own: dict[str, Tensor], sources: list[str] | None) -> dict[str, Any]:
        features, distance = DISTANCES[name]
        first, real = own[features], self._real[features]

        def without_patient(rows: np.ndarray) -> float:
            return distance(first, real[rows])

        def without_source(rows: np.ndarray) -> float:
            return distance(first[rows], real)

        return {
            "value": distance(first, real),
            "left_out": leave_one_out(without_patient, self._held_out.sources),
            "own_variance": 0.0 if sources is None else jackknife_variance(leave_one_out(without_source, sources)),
        }

    def _features(self, pictures: Tensor) -> dict[str, Tensor]:
        return {
            "efficientnet": extract_features(self._efficientnet, pictures),
            "efficientnet_matched": extract_features(self._efficientnet, histogram_match(pictures, self._levels)),
            "gabor": extract_features(self._gabor, pictures),
        }
