"""Ridge regressions that any trained network must beat: fitted in a second, from sums over visits.

cross-sectional   z = b_site + W·φ(c): how latents differ between patients of other attributes
longitudinal      z₂ - z₁ = years · C·[1, φ(c₁), P z₁]: how a patient's latents change in a year, as a function of the
                  attributes and of the scan itself, its principal components

φ(c) are the modality's design vector and the products of its numbers with its categories. All that is learned follows
from sums over the visits of a site (XᵀX, XᵀY), which add up over sites.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ld_common.imaging.modality import Attributes, Modality
from ld_simulations.benchmarks.individual.people import Person, ScannedVisit, with_mirror_images

PENALTY = 1e-3
"""Of a coefficient of φ, a visit."""
SCAN_PENALTY = 0.1
"""Of a coefficient of a principal component of unit variance, a pair."""
STEP_YEARS = 2.5
"""Attributes and components are renewed after so many years of a long change."""


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums of one site; `a + b` are those of both."""

    gram: np.ndarray
    """XᵀX, `(P,P)`."""
    cross: np.ndarray
    """XᵀY, `(P,D)`."""
    rows: int

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.gram + other.gram, self.cross + other.cross, self.rows + other.rows)

    def solve(self, penalty: np.ndarray) -> np.ndarray:
        """Coefficients `(P,D)` with a penalty `(P,)` a row."""
        solution: np.ndarray = np.linalg.solve(self.gram + self.rows * np.diag(penalty), self.cross)
        return solution


def features(modality: Modality, attributes: Attributes) -> np.ndarray:
    """φ(c): the design vector and the products of its numbers with its categories."""
    design = modality.design_vector(attributes)
    numeric, column = [], 0
    for attribute in modality.attributes.values():
        width = max(1, len(attribute.categories) - 1)
        numeric += [not attribute.categories] * width
        column += width
    numbers = [value for value, number in zip(design, numeric, strict=True) if number]
    words = [value for value, number in zip(design, numeric, strict=True) if not number]
    return np.array([*design, *(number * word for number in numbers for word in words)])


def cross_sectional_sums(people: Sequence[Person], modality: Modality) -> Sums:
    """Of one site; centring on the site's own means gives it an intercept of its own."""
    visits = [visit for person in people for visit in person.visits]
    x = np.stack([features(modality, visit.attributes) for visit in visits])
    y = np.stack([_flat(visit.latent) for visit in visits])
    x, y = x - x.mean(0), y - y.mean(0)
    return Sums(x.T @ x, x.T @ y, len(visits))


@dataclass(frozen=True, eq=False)
class Components:
    """Principal components of latents."""

    mean: np.ndarray
    directions: np.ndarray
    """`(K,D)`, scaled so that a component has unit variance."""

    @classmethod
    def of(cls, visits: Sequence[ScannedVisit], components: int) -> Components:
        """The first principal components of the visits' latents."""
        latents = np.stack([_flat(visit.latent) for visit in visits])
        mean = latents.mean(0)
        _, sizes, directions = np.linalg.svd(latents - mean, full_matrices=False)
        scales = sizes[:components] / math.sqrt(len(latents))
        return cls(mean, directions[:components] / scales[:, None])

    def of_latent(self, latent: np.ndarray) -> np.ndarray:
        """Components `(K,)` of a latent `(D,)`."""
        parts: np.ndarray = self.directions @ (latent - self.mean)
        return parts


def longitudinal_sums(people: Sequence[Person], modality: Modality, basis: Components) -> Sums:
    """Of one site: all pairs of visits of a patient."""
    rows, changes = [], []
    for person in people:
        for number, before in enumerate(person.visits):
            for after in person.visits[number + 1 :]:
                years = float(after.attributes["age"]) - float(before.attributes["age"])
                if years > 0:
                    latent = _flat(before.latent)
                    rows.append(years * _yearly(modality, before.attributes, basis, latent))
                    changes.append(_flat(after.latent) - latent)
    x, y = np.stack(rows), np.stack(changes)
    return Sums(x.T @ x, x.T @ y, len(rows))


@dataclass(frozen=True, eq=False)
class RidgeRules:
    """Both regressions, fitted on the sums of all sites."""

    modality: Modality
    attribute_change: np.ndarray
    """W, `(F,D)`."""
    basis: Components
    yearly_change: np.ndarray
    """C, `(1+F+K,D)`."""

    @classmethod
    def fit(cls, people: Sequence[Person], modality: Modality, components: int) -> RidgeRules:
        """Fit on patients of several sites; equal to a fit on pooled rows with an intercept a site.

        Where left and right are alike, mirror images are learned from as well, as the longitudinal drift does.
        """
        people = with_mirror_images(people)
        sites = [[person for person in people if person.hospital == name] for name in _names(people)]
        across = [cross_sectional_sums(site, modality) for site in sites]
        basis = Components.of([visit for person in people for visit in person.visits], components)
        over_time = [longitudinal_sums(site, modality, basis) for site in sites]
        width = len(across[0].gram)
        penalty = np.array([PENALTY] * (1 + width) + [SCAN_PENALTY] * components)
        attribute_change = sum(across[1:], across[0]).solve(np.full(width, PENALTY))
        return cls(modality, attribute_change, basis, sum(over_time[1:], over_time[0]).solve(penalty))

    def cross_sectional(self, source: Attributes, target: Attributes) -> np.ndarray:
        """Change of a latent `(D,)` between attributes."""
        step: np.ndarray = features(self.modality, target) - features(self.modality, source)
        change: np.ndarray = step @ self.attribute_change
        return change

    def longitudinal(self, visit: ScannedVisit, target: Attributes, scale: float = 1.0) -> np.ndarray:
        """Change of a visit's latent `(D,)` until the target's age; other attributes change first, at once."""
        others = {**target, "age": visit.attributes["age"]}
        start = _flat(visit.latent)
        latent = start + scale * self.cross_sectional(visit.attributes, others)
        age, years = float(visit.attributes["age"]), float(target["age"]) - float(visit.attributes["age"])
        steps = max(1, math.ceil(abs(years) / STEP_YEARS))
        for number in range(steps):
            attributes = others | {"age": age + years * number / steps}
            yearly = _yearly(self.modality, attributes, self.basis, latent) @ self.yearly_change
            latent = latent + scale * years / steps * yearly
        return latent - start


def own_slope(visits: Sequence[ScannedVisit]) -> np.ndarray:
    """Change of a patient's latent `(D,)` in a year, from the first visit to the last."""
    years = float(visits[-1].attributes["age"]) - float(visits[0].attributes["age"])
    slope: np.ndarray = (_flat(visits[-1].latent) - _flat(visits[0].latent)) / years
    return slope


def area_slope(visits: Sequence[ScannedVisit]) -> float:
    """Change of a patient's measured area in a year, by least squares, mm2."""
    ages = np.array([float(visit.attributes["age"]) for visit in visits])
    return float(np.polyfit(ages - ages.mean(), [visit.measured_mm2 for visit in visits], 1)[0])


def as_latents(changes: Sequence[np.ndarray], visit: ScannedVisit) -> Tensor:
    """A visit's latent under each change, `(M,C,h,w)`."""
    moved = [torch.from_numpy(change).view_as(visit.latent).float() + visit.latent for change in changes]
    return torch.stack(moved)


def _yearly(modality: Modality, attributes: Attributes, basis: Components, latent: np.ndarray) -> np.ndarray:
    return np.concatenate([[1.0], features(modality, attributes), basis.of_latent(latent)])


def _flat(latent: Tensor) -> np.ndarray:
    values: np.ndarray = latent.double().numpy().ravel()
    return values


def _names(people: Sequence[Person]) -> list[str]:
    return list(dict.fromkeys(person.hospital for person in people))
