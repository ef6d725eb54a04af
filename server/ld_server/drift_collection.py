"""What the server keeps of the sites' latent drifts from round to round, and makes of them.

Most drifts are tensors of which the release holds the mean. A longitudinal drift is solved from sums, which take two
rounds: the first gives the directions of its basis (`longitudinal_sums`), every later one the regression's sums. A
private one has its basis from the study's start, and sites send the same noised sums in every round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ld_common.core.config import require
from ld_common.core.state import State
from ld_common.diffusion.base_model import Denoiser, base_latent_mean
from ld_common.diffusion.drift import ConditionalDrift, LatentDrift, entering
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.diffusion.longitudinal_fit import fit
from ld_common.diffusion.longitudinal_sums import (
    Basis,
    basis_of,
    feature_columns,
    flat_size,
    layout,
    sketch_layout,
    unflatten,
)
from ld_common.diffusion.options import largest_drift
from ld_common.diffusion.private_longitudinal import noise_deviations
from ld_common.diffusion.private_longitudinal_fit import SumNoise, fit_private
from ld_common.diffusion.public_basis import PublicBasis
from ld_common.imaging.modality import Modality
from ld_common.protocol.study_config import StudyConfig
from ld_server.aggregation import Aggregator, Mean, aggregate_drifts
from ld_server.drift_form import DriftForm

AnyDrift = LatentDrift | ConditionalDrift | LongitudinalDrift


@dataclass
class CollectedDrifts:
    """Part of a checkpoint."""

    sites: dict[str, Tensor] = field(default_factory=dict)
    """What each site sent last."""
    weights: dict[str, float] = field(default_factory=dict)
    """Each site's weight in its last average."""
    mean: Tensor | None = None
    """Mean over the sites of a secure sum, where no site's own is known."""
    basis: State = field(default_factory=dict)
    """Of a longitudinal drift, after its first round; of a private one, from the start."""


class DriftCollection(ABC):
    """The drifts of a study's sites."""

    def __init__(self) -> None:
        self.collected = CollectedDrifts()

    @property
    @abstractmethod
    def form(self) -> DriftForm | None:
        """What the sites send in the next round; None for nothing."""

    def add(self, drifts: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
        """Take what the sites of a round sent."""
        self.collected.sites |= drifts
        self.collected.weights |= weights

    def add_mean(self, mean: Tensor | None) -> None:
        """Take the mean `float64` of a round's secure sum."""
        self.collected.mean = mean

    @abstractmethod
    def released(self) -> AnyDrift | None:
        """The drift of the release; raises `ConfigError` where the sites' data do not allow one."""

    def released_sites(self) -> dict[str, AnyDrift]:
        """The drift of each site that the release shows."""
        return {}

    def scored(self) -> LongitudinalDrift | None:
        """The longitudinal drift so far, which sites score on pairs of visits; None where there is none yet."""
        return None


class MeanDrifts(DriftCollection):
    """Drifts that are aggregated like the adapter."""

    def __init__(self, study: StudyConfig, shape: torch.Size | None, aggregator: Aggregator) -> None:
        super().__init__()
        self._study, self._aggregator = study, aggregator
        largest = largest_drift(study.drift.shape)
        self._form = None if shape is None else DriftForm(shape, torch.float32, largest)

    @property
    def form(self) -> DriftForm | None:
        """The same in each round."""
        return self._form

    def add_mean(self, mean: Tensor | None) -> None:
        """Take it as float32."""
        super().add_mean(None if mean is None else mean.float())

    def released(self) -> AnyDrift | None:
        """The sites' drifts by the study's aggregator, or the mean of the last secure sum; None before any came."""
        kept = self.collected
        mean = kept.mean
        if not self._study.federation.secure_aggregation:
            mean = aggregate_drifts(kept.sites, kept.weights, self._aggregator)
        return None if mean is None else entering(mean, self._study.drift.formulation)

    def released_sites(self) -> dict[str, AnyDrift]:
        """Those that the sites sent."""
        return {name: entering(value, self._study.drift.formulation) for name, value in self.collected.sites.items()}


class LongitudinalSums(DriftCollection):
    """The sums of a longitudinal drift; they are added in the order of the sites' names, in float64."""

    def __init__(self, study: StudyConfig, modality: Modality, model: Denoiser) -> None:
        super().__init__()
        self._study, self._modality, self._latent_shape = study, modality, model.latent_shape
        size = torch.Size(model.latent_shape).numel()
        self._sketch, self._sums = sketch_layout(size), layout(size, len(feature_columns(modality.numeric_columns)))

    @property
    def form(self) -> DriftForm:
        """A sketch first, then sums."""
        shapes = self._sums if self.collected.basis else self._sketch
        return DriftForm(torch.Size([flat_size(shapes)]), torch.float64, largest_drift("longitudinal"))

    def add(self, drifts: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
        """Keep sums; sketches become the basis."""
        if self.collected.basis:
            super().add(drifts, dict.fromkeys(drifts, 1.0))
        elif drifts:
            self._set_basis(torch.stack([drifts[name] for name in sorted(drifts)]).sum(0))

    def add_mean(self, mean: Tensor | None) -> None:
        """Keep sums; the sketch becomes the basis."""
        if self.collected.basis:
            super().add_mean(mean)
        elif mean is not None:
            self._set_basis(mean)

    def _set_basis(self, sketched: Tensor) -> None:
        self.collected.basis = basis_of(unflatten(sketched, self._sketch), self._study.seed).state()

    def released(self) -> AnyDrift | None:
        """Solve the regressions; None before any sums came."""
        kept = self.collected
        summed = kept.mean
        if kept.sites:
            summed = torch.stack([kept.sites[name] for name in sorted(kept.sites)]).sum(0)
        if summed is None:
            return None
        base_mean = base_latent_mean(self._study.base_model, self._latent_shape[0])
        sums, numeric = unflatten(summed, self._sums), self._modality.numeric_columns
        return fit(sums, Basis(**kept.basis), numeric, base_mean, self._latent_shape)[0]

    def scored(self) -> LongitudinalDrift | None:
        """Solved from the sums so far."""
        drift = self.released() if self.collected.sites else None
        return drift if isinstance(drift, LongitudinalDrift) else None


class PrivateLongitudinalSums(DriftCollection):
    """The noised sums of a longitudinal drift in the basis of the study's start."""

    def __init__(self, study: StudyConfig, public: LongitudinalDrift | None) -> None:
        """Begin with the basis of a start's drift; a resumed study, without one, has it from its checkpoint."""
        super().__init__()
        self._study = study
        if public is not None:
            self.collected.basis = PublicBasis.of(public).state()

    @property
    def form(self) -> DriftForm:
        """The same in each round."""
        basis = PublicBasis.from_state(self.collected.basis)
        return DriftForm(torch.Size([basis.size]), torch.float64, largest_drift("longitudinal"))

    def released(self) -> AnyDrift | None:
        """The start's drift, corrected by the sites' sums; None before any came.

        How many sites are in a secure sum is not known here: the study's number stands for it.
        """
        kept, privacy, sites = self.collected, self._study.privacy, len(self._study.federation.sites)
        if kept.mean is not None:
            summed = sites * kept.mean
        elif kept.sites:
            summed, sites = torch.stack([kept.sites[name] for name in sorted(kept.sites)]).sum(0), len(kept.sites)
        else:
            return None
        means, regressions = noise_deviations(privacy.drift_noise_multiplier, privacy.drift_clip_norm)
        noise = SumNoise(sites**0.5 * means, sites**0.5 * regressions)
        return fit_private(summed, PublicBasis.from_state(kept.basis), noise)


def drift_collection(
    study: StudyConfig,
    modality: Modality,
    model: Denoiser,
    aggregator: Aggregator,
    public: LongitudinalDrift | None = None,
) -> DriftCollection:
    """The collection that a study's `drift.shape` needs.

    Args:
        study: the study.
        modality: its modality.
        model: its base.
        aggregator: of the adapters.
        public: the drift of the study's start, for a private longitudinal one.

    Raises:
        ConfigError: an aggregator that does not fit, or a public drift of other latents or attributes.
    """
    if study.drift.shape == "longitudinal":
        fits = isinstance(aggregator, Mean)
        require(fits, f"drift.shape longitudinal adds sums up, which aggregation {aggregator.name} cannot: use mean")
        if not study.privacy.enabled:
            return LongitudinalSums(study, modality, model)
        if public is not None:
            size, numeric = torch.Size(model.latent_shape).numel(), [bool(number) for number in public.numeric]
            fits = len(public.mean) == size and numeric == list(modality.numeric_columns)
            require(fits, "the longitudinal drift of the study's start is of another base model or modality")
        return PrivateLongitudinalSums(study, public)
    shapes: dict[str, Any] = {
        "scalar": (1, 1, 1),
        "channel": (model.latent_shape[0], 1, 1),
        "map": model.latent_shape,
        "conditional": (1 + modality.design_width, *model.latent_shape),
    }
    shape: Sequence[int] | None = shapes.get(study.drift.shape)
    return MeanDrifts(study, None if shape is None else torch.Size(shape), aggregator)
