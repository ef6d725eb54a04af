"""Longitudinal drift: how a patient's latents change with the years, as a function of the scan and its attributes.

    z(t + h) = z(t) + h · C · x(z(t), c),    x = [1, φ(c), p(z)]      change in a year
    E[z | c] = m + W φ(c)                                             patients of other attributes
    a category that acts like years:  φ' - φ = 1  is  τ years of the change above

φ(c) and p(z) are those of `longitudinal_sums`, p scaled to unit variance. C is learned within patients, from all pairs
of visits; W and τ between patients, where nobody changes between visits. Disease typically acts like years of ageing,
and then the change that the patient's own scan predicts is the better answer than the mean difference of the groups;
sex does not. `longitudinal_fit` decides by cross-validation over patients. Sampling from noise starts at E[z | c].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ld_common.core.errors import ReleaseError
from ld_common.core.state import State
from ld_common.diffusion.drift import LatentDrift
from ld_common.diffusion.longitudinal_sums import attribute_features, feature_columns, regressors
from ld_common.diffusion.unfamiliarity import Unfamiliarity

STEP_YEARS = 2.5
"""The scan's parts are renewed after so many years of a longer change."""
SPREAD_SHRINKAGE = 0.1
"""Weight of the identity in the covariance of parts that `unfamiliarity` inverts: parts have unit variance."""
PREFIX = "longitudinal."


@dataclass(frozen=True)
class AttributeChange:
    """What an edit asks for, as design vectors of the modality: categories change first, then the years pass."""

    source: tuple[float, ...]
    switched: tuple[float, ...]
    """The target's attributes at the source's age."""
    target: tuple[float, ...]
    years: float
    """From the source's age to the target's; below 0 for a younger patient."""


@dataclass(frozen=True, eq=False)
class LongitudinalDrift:
    """A fitted longitudinal drift; all tensors float32, D numbers of latents, F features, K parts."""

    mean: Tensor
    """m, `(D,)`."""
    effect: Tensor
    """W, `(F,D)`."""
    centre: Tensor
    """Where parts are measured from, `(D,)`."""
    directions: Tensor
    """Parts are `directions` · (z - centre), `(K,D)`, of unit variance within sites."""
    yearly: Tensor
    """C, `(1+F+K,D)`."""
    years: Tensor
    """τ of each feature, `(F,)`; 0 where it does not act like years."""
    numeric: Tensor
    """1 for the design vector's numbers, 0 for its categories, `(k,)`."""
    part_effect: Tensor
    """W in parts, `(F,K)`."""
    part_mean: Tensor
    """Parts of m, `(K,)`."""
    part_spread: Tensor
    """Covariance of the parts between patients of the same attributes and site, `(K,K)`."""
    change_spread: Tensor
    """Covariance of a pair's change around the predicted one, in parts, `(K,K)`: the noise of two visits."""
    outside: Tensor
    """Mean and standard deviation of a visit's root mean square outside of the basis, `(2,)`."""
    edge_speed: Tensor
    """β of `edge_growth`, `(1+F+K,)`; all 0 where nothing was measured."""
    base_mean: Tensor
    """The base's own mean by channel `(C,)`."""
    latent_shape: Tensor
    """C, h, w."""
    formulation: str = "prior"

    def state(self) -> State:
        """As a release stores it."""
        return {PREFIX + field.name: getattr(self, field.name) for field in fields(self) if field.name != "formulation"}

    @classmethod
    def from_state(cls, state: State) -> LongitudinalDrift:
        """Undo `state`; raises `ReleaseError` unless names and shapes are those of a longitudinal drift."""
        names = [field.name for field in fields(cls) if field.name != "formulation"]
        if {PREFIX + name for name in names} != set(state):
            raise ReleaseError("the longitudinal drift lacks a tensor, or has one too many: copy the release again")
        drift = cls(**{name: state[PREFIX + name].float() for name in names})
        (rows, size), parts, channels = drift.effect.shape, len(drift.directions), len(drift.base_mean)
        shapes = {
            "mean": (size,),
            "centre": (size,),
            "directions": (parts, size),
            "yearly": (1 + rows + parts, size),
            "years": (rows,),
            "part_effect": (rows, parts),
            "part_mean": (parts,),
            "part_spread": (parts, parts),
            "change_spread": (parts, parts),
            "outside": (2,),
            "edge_speed": (1 + rows + parts,),
            "latent_shape": (3,),
        }
        wrong = [name for name, shape in shapes.items() if getattr(drift, name).shape != shape]
        finite = all(bool(getattr(drift, name).isfinite().all()) for name in names)
        fits = math.prod(drift.latent_shape.int().tolist()) == size and int(drift.latent_shape[0]) == channels
        if wrong or not finite or not fits:
            raise ReleaseError(
                f"the longitudinal drift has a wrong tensor ({', '.join(wrong)}): copy the release again"
            )
        return drift

    def features(self, designs: Tensor) -> Tensor:
        """φ `(N,F)` of design vectors `(N,k)`."""
        return attribute_features(designs, [bool(number) for number in self.numeric])

    def parts(self, latents: Tensor) -> Tensor:
        """Parts `(N,K)` of flat latents `(N,D)`."""
        return (latents - self.centre) @ self.directions.T

    def at(self, design: Sequence[Sequence[float]]) -> LatentDrift:
        """Where sampling from noise starts for these design vectors `(B,k)`: E[z | c] minus the base's mean."""
        mean = self.mean + self.features(torch.tensor(design)) @ self.effect
        shape = [int(size) for size in self.latent_shape]
        return LatentDrift(mean.view(-1, *shape) - self.base_mean.view(-1, 1, 1), self.formulation)

    def change(
        self, latents: Tensor, asked: AttributeChange, time_scale: float = 1.0, effect_scale: float = 1.0
    ) -> Tensor:
        """What changes in a scan's latents `(C,h,w)` until an edit's target, in closed form.

        Args:
            latents: of the scan, scaled.
            asked: the edit.
            time_scale: factor of the change with the years; ridge regression shrinks it.
            effect_scale: factor of the difference between groups.
        """
        start = latents.detach().cpu().float().reshape(1, -1)
        moved = start
        for step in self.steps(asked):
            source, switched, target = (torch.tensor([row]) for row in (step.source, step.switched, step.target))
            turned = self.features(switched) - self.features(source)
            moved = moved + effect_scale * torch.where(self._rows_like_years, 0.0, turned) @ self.effect
            scale = time_scale if step.years else 1.0
            moved = self._walk(moved, switched if step.years else source, target, self.elapsed(step), scale)
        return (moved - start).view_as(latents).to(latents)

    def steps(self, asked: AttributeChange) -> list[AttributeChange]:
        """An edit as changes one after the other: of categories, of those that act like years, and of the years.

        A change of nothing is left out.
        """
        acts = self._columns_like_years
        turned = tuple(
            before if like else after for before, after, like in zip(asked.source, asked.switched, acts, strict=True)
        )
        steps = [
            AttributeChange(asked.source, turned, turned, 0.0),
            AttributeChange(turned, asked.switched, asked.switched, 0.0),
            AttributeChange(asked.switched, asked.switched, asked.target, asked.years),
        ]
        return [step for step in steps if step.source != step.target or step.years]

    def elapsed(self, step: AttributeChange) -> float:
        """Years that one of `steps` takes or acts like; below 0 where it goes back."""
        source, switched = (torch.tensor([row]) for row in (step.source, step.switched))
        return step.years + float((self.features(switched) - self.features(source)) @ self.years)

    @property
    def tells_growth(self) -> bool:
        """Whether `growth` is known."""
        return bool(self.edge_speed.any())

    def growth(self, latents: Tensor, step: AttributeChange, edge: float) -> float:
        """By how much one of `steps` makes the measured structure grow, as a share of the picture.

        The years of a category pass as they do in the group that is further on: those that a disease acts like were
        lived with it, whether it is added or taken away.

        Args:
            latents: of the scan `(C,h,w)`, scaled.
            step: what changes; a category that does not act like years makes nothing grow.
            edge: length of the structure's edge, before it grows, as a share of the picture's side.
        """
        years = self.elapsed(step)
        design = step.target if years > 0 else step.source
        if step.years:
            design = tuple((first + last) / 2 for first, last in zip(step.switched, step.target, strict=True))
        parts = self.parts(latents.detach().cpu().float().reshape(1, -1))
        return edge * years * float(regressors(self.features(torch.tensor([design])), parts)[0] @ self.edge_speed)

    def unfamiliarity(self, latents: Tensor, design: Sequence[float]) -> Unfamiliarity:
        """How far a scan's latents `(C,h,w)` lie from those of the sites' patients of the same design vector."""
        centred = latents.detach().cpu().float().reshape(1, -1) - self.centre
        parts, variances = centred @ self.directions.T, 1 / self.directions.square().sum(1)
        expected = self.part_mean + self.features(torch.tensor([design])) @ self.part_effect
        values, vectors = torch.linalg.eigh(self.part_spread)
        values = (1 - SPREAD_SHRINKAGE) * values.clamp_min(0) + SPREAD_SHRINKAGE  # noise may make some negative
        squares = ((parts - expected) @ vectors).square() / values
        outside = centred.square().sum() - (parts.square() * variances).sum()
        spread = variances.sum() + len(self.centre) * self.outside.square().sum()
        return Unfamiliarity(float(squares.mean().sqrt()), float((outside.clamp_min(0) / spread).sqrt()))

    @property
    def _columns_like_years(self) -> list[bool]:
        """For each column of a design vector, whether it is a category that acts like years."""
        columns = feature_columns([bool(number) for number in self.numeric])
        acting = [of for of, years in zip(columns, self.years.tolist(), strict=True) if years]
        return [
            not number and any(column in of for of in acting) for column, number in enumerate(self.numeric.tolist())
        ]

    @property
    def _rows_like_years(self) -> Tensor:
        """Features of a category that acts like years `(F,)`, with its products: τ takes the place of their effects."""
        acts, columns = self._columns_like_years, feature_columns([bool(number) for number in self.numeric])
        return torch.tensor([any(acts[column] for column in of) for of in columns])

    def _walk(self, latents: Tensor, first: Tensor, last: Tensor, years: float, scale: float) -> Tensor:
        """Latents after some years, in steps; the design vector goes from `first` to `last`."""
        steps = math.ceil(abs(years) / STEP_YEARS)
        for number in range(steps):
            features = self.features(first + (last - first) * (number / steps))
            latents = latents + scale * years / steps * (regressors(features, self.parts(latents)) @ self.yearly)
        return latents
