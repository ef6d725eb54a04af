"""What a site computes for a longitudinal drift: sums over its visits, which add up over sites.

Two rounds are needed, because the regression reads a scan through a few directions of the latent space that depend on
the data:

    sketch   n, Σz, Σ z zᵀΩ        Ω (D,q) random, the same everywhere; the server finds the q directions of `Basis`
    sums     of `layout`           what `longitudinal_fit` solves

Features φ(c) are an attribute's design vector and the products of its numbers with its categories; a scan's parts are
p(z) = directions · (z - mean). Of a structure that the modality measures, areas A and edges L give the rows of a third
regression, `edge_growth`. Visits are centred on their site's mean, which is an intercept a site. Sums over pairs
are kept apart for `FOLDS` groups of patients, so that the server chooses the ridge on patients who were held back.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ld_common.core.errors import ConfigError
from ld_common.core.seeding import torch_generator
from ld_common.core.state import State

DIRECTIONS = 96
"""Most directions of a sketch: 48 principal components of 144 patients' latents lie in it within 1 %."""
FOLDS = 4
DAYS_IN_YEAR = 365.25
SMALLEST_SHARE = 1e-8
"""Least eigenvalue of a sketch's core, as a share of the largest: those of few visits, or of a quantised sum, are 0."""
LEAST_DEVIATION = 0.01
"""Of a direction, as a share of the largest: those of a few visits do not fill the sketch."""


@dataclass(frozen=True, eq=False)
class StructureSizes:
    """Sizes of a structure in N pictures, as shares of the picture's area and side."""

    areas: Tensor
    """`(N,)` float64."""
    edges: Tensor
    """Length of its edge, `(N,)` float64; all 1 where the biomarker has no such measure."""


@dataclass(frozen=True, eq=False)
class VisitTable:
    """A site's visits, N in all, with D numbers of latents each; a mirror image counts as a visit."""

    latents: Tensor
    """`(N,D)` float64, scaled."""
    features: Tensor
    """`(N,F)` float64, of `attribute_features`."""
    patients: Sequence[str]
    years: Tensor
    """`(N,)` since the patient's first visit."""
    structure: StructureSizes | None = None
    """What the modality measures; None measures nothing."""
    mirrored: Sequence[bool] = ()
    """Which visits are mirror images; empty where none is."""

    @classmethod
    def of(
        cls,
        latents: Tensor,
        designs: Sequence[Sequence[float]],
        numeric: Sequence[bool],
        patients: Sequence[str],
        days: Sequence[float],
        structure: StructureSizes | None = None,
        mirrored: Tensor | None = None,
    ) -> VisitTable:
        """From a site's visits.

        Args:
            latents: `(N,C,h,w)`, scaled.
            designs: `Modality.design_vector` of each.
            numeric: which of its columns are numbers.
            patients: pseudonym of each.
            days: since the patient's first visit.
            structure: what the modality measures in each.
            mirrored: latents of the mirror images `(N,C,h,w)`, where left and right are alike; they are added as
                visits of the same patients.
        """
        features = attribute_features(torch.tensor(designs, dtype=torch.float64), numeric)
        years, names = torch.tensor(days, dtype=torch.float64) / DAYS_IN_YEAR, list(patients)
        table = cls(latents.flatten(1).double(), features, names, years, structure)
        return table if mirrored is None else table.beside(mirrored.flatten(1))

    def beside(self, mirrored: Tensor) -> VisitTable:
        """The visits, and after them their mirror images `(N,D)` as visits of the same patients."""
        twice = self.structure
        if twice is not None:
            twice = StructureSizes(twice.areas.repeat(2), twice.edges.repeat(2))
        count = len(self.patients)
        return VisitTable(
            torch.cat([self.latents, mirrored.double()]),
            self.features.repeat(2, 1),
            [*self.patients, *self.patients],
            self.years.repeat(2),
            twice,
            [False] * count + [True] * count,
        )

    def pairs(self) -> list[tuple[int, int]]:
        """Rows of an earlier and a later visit of a patient, all pairs; of two mirror images or of none."""
        rows = defaultdict(list)
        for row, (patient, mirrored) in enumerate(
            zip(self.patients, self.mirrored or [False] * len(self.patients), strict=True)
        ):
            rows[patient, mirrored].append(row)
        return [
            (first, second)
            for visits in rows.values()
            for first in visits
            for second in visits
            if self.years[second] > self.years[first]
        ]


@dataclass(frozen=True, eq=False)
class Basis:
    """The directions through which a regression reads a scan."""

    mean: Tensor
    """`(D,)` float64."""
    directions: Tensor
    """`(q,D)` float64, orthogonal rows by which parts have about unit variance."""

    def parts(self, latents: Tensor) -> Tensor:
        """Parts `(N,q)` of latents `(N,D)`."""
        return (latents - self.mean) @ self.directions.T

    def energy(self, parts: Tensor) -> Tensor:
        """|z - mean|² `(N,)` of what lies in the basis, from parts `(N,q)`."""
        return (parts * self.deviations).square().sum(1)

    @property
    def deviations(self) -> Tensor:
        """Standard deviation of latents along each direction, `(q,)`."""
        return 1 / self.directions.norm(dim=1)

    def state(self) -> State:
        """As a message carries it."""
        return {"mean": self.mean, "directions": self.directions}


def attribute_features(designs: Tensor, numeric: Sequence[bool]) -> Tensor:
    """φ `(N,F)` of design vectors `(N,k)`: the vector, then the products of its numbers with its categories."""
    numbers = [column for column, number in enumerate(numeric) if number]
    words = [column for column, number in enumerate(numeric) if not number]
    products = [designs[:, number] * designs[:, word] for number in numbers for word in words]
    return torch.cat([designs, *(product[:, None] for product in products)], 1)


def feature_columns(numeric: Sequence[bool]) -> list[tuple[int, ...]]:
    """For each feature of `attribute_features`, the columns of the design vector that it is a product of."""
    numbers = [column for column, number in enumerate(numeric) if number]
    words = [column for column, number in enumerate(numeric) if not number]
    products = [(number, word) for number in numbers for word in words]
    return [*((column,) for column in range(len(numeric))), *products]


def directions_of(latent_size: int) -> int:
    """Number q of directions of a sketch of latents with D numbers."""
    return min(DIRECTIONS, latent_size)


def sketch_layout(latent_size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the sums of `sketch`."""
    return {"visits": (1,), "latents": (latent_size,), "moments": (latent_size, directions_of(latent_size))}


def layout(latent_size: int, features: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the sums of `sums`."""
    parts = directions_of(latent_size)
    row = 1 + features + parts
    return {
        "visits": (1,),
        "latents": (latent_size,),
        "features": (features,),
        "outside": (2,),
        "across_features": (FOLDS, features, features),
        "across_parts": (FOLDS, features, parts),
        "across_spread": (parts, parts),
        "across_latents": (features, latent_size),
        "pairs": (FOLDS,),
        "time_features": (FOLDS, row, row),
        "time_parts": (FOLDS, row, parts),
        "time_energy": (FOLDS,),
        "time_spread": (parts, parts),
        "time_latents": (row, latent_size),
        "growth_features": (FOLDS, row, row),
        "growth_areas": (FOLDS, row),
        "growth_years": (FOLDS,),
    }


def sketch(table: VisitTable, seed: int) -> State:
    """A site's sums of the first round, as `sketch_layout`; Ω follows from the seed."""
    size = table.latents.shape[1]
    return {
        "visits": torch.tensor([float(len(table.latents))], dtype=torch.float64),
        "latents": table.latents.sum(0),
        "moments": table.latents.T @ (table.latents @ _test_matrix(size, seed)),
    }


def basis_of(sketched: State, seed: int) -> Basis:
    """The directions in which latents differ most, from the sum of the sites' sketches.

    The Nyström approximation C ≈ CΩ (ΩᵀCΩ)⁻¹ (CΩ)ᵀ of the covariance gives them and their variances from one pass over
    the visits (arXiv 1706.05736, algorithm 3).

    Raises:
        ConfigError: there are no two visits that differ.
    """
    visits = float(sketched["visits"][0])
    mean = sketched["latents"] / max(visits, 1.0)
    matrix = _test_matrix(len(mean), seed)
    covariance = sketched["moments"] / max(visits, 1.0) - torch.outer(mean, mean @ matrix)
    if not float(covariance.abs().max()) > 0:
        raise ConfigError("drift.shape longitudinal: the sites have no two visits that differ")
    core = matrix.T @ covariance
    values, turned = torch.linalg.eigh((core + core.T) / 2)
    values = values.clamp_min(SMALLEST_SHARE * float(values[-1]))
    vectors, sizes, _ = torch.linalg.svd(covariance @ turned / values.sqrt(), full_matrices=False)
    deviations = sizes.clamp_min(LEAST_DEVIATION * float(sizes[0]))
    return Basis(mean, (vectors / deviations).T.contiguous())


def sums(table: VisitTable, basis: Basis) -> State:
    """A site's sums of later rounds, as `layout`."""
    parts, features = basis.parts(table.latents), table.features
    beyond = (table.latents - basis.mean).square().sum(1) - basis.energy(parts)
    outside = (beyond.clamp_min(0) / table.latents.shape[1]).sqrt()
    centred = features - features.mean(0), parts - parts.mean(0), table.latents - table.latents.mean(0)
    folds = torch.tensor([fold_of(patient) for patient in table.patients])
    groups = [folds == fold for fold in range(FOLDS)]
    across = {
        "visits": torch.tensor([float(len(parts))], dtype=torch.float64),
        "latents": table.latents.sum(0),
        "features": features.sum(0),
        "outside": torch.stack([outside.sum(), outside.square().sum()]),
        "across_features": torch.stack([centred[0][rows].T @ centred[0][rows] for rows in groups]),
        "across_parts": torch.stack([centred[0][rows].T @ centred[1][rows] for rows in groups]),
        "across_spread": centred[1].T @ centred[1],
        "across_latents": centred[0].T @ centred[2],
    }
    return across | _pair_sums(table, basis, folds)


def added(states: Sequence[State]) -> State:
    """The sum of several sites' sums, in their order."""
    return {name: torch.stack([state[name] for state in states]).sum(0) for name in states[0]}


def _pair_sums(table: VisitTable, basis: Basis, folds: Tensor) -> State:
    pairs = table.pairs()
    first, second = (torch.tensor([pair[side] for pair in pairs], dtype=torch.long) for side in (0, 1))
    years = (table.years[second] - table.years[first])[:, None]
    read = regressors(table.features, basis.parts(table.latents))
    rows = years * read[first]
    changes = table.latents[second] - table.latents[first]
    moved = changes @ basis.directions.T
    groups = [folds[first] == fold for fold in range(FOLDS)]
    return {
        "pairs": torch.tensor([float(group.sum()) for group in groups], dtype=torch.float64),
        "time_features": torch.stack([rows[group].T @ rows[group] for group in groups]),
        "time_parts": torch.stack([rows[group].T @ moved[group] for group in groups]),
        "time_energy": torch.stack([basis.energy(moved[group]).sum() for group in groups]),
        "time_spread": moved.T @ moved,
        "time_latents": rows.T @ changes,
        **_growth_sums(table.structure, read, years, (first, second), groups),
    }


def _growth_sums(
    structure: StructureSizes | None, read: Tensor, years: Tensor, pairs: tuple[Tensor, Tensor], groups: list[Tensor]
) -> State:
    """Sums of what `edge_growth` regresses: edge times x, the mean of both visits, times the years; and the growth."""
    if structure is None:
        structure = StructureSizes(*torch.zeros(2, len(read), dtype=torch.float64))
    first, second = pairs
    scaled = structure.edges.double()[:, None] * read
    rows = years * (scaled[first] + scaled[second]) / 2
    growth = (structure.areas[second] - structure.areas[first]).double()
    return {
        "growth_features": torch.stack([rows[group].T @ rows[group] for group in groups]),
        "growth_areas": torch.stack([rows[group].T @ growth[group] for group in groups]),
        "growth_years": torch.stack([years[group, 0] @ growth[group] for group in groups]),
    }


def regressors(features: Tensor, parts: Tensor) -> Tensor:
    """x = [1, φ, p], `(N,1+F+q)`."""
    return torch.cat([torch.ones(len(features), 1, dtype=features.dtype), features, parts], 1)


def held_back_folds() -> Iterator[tuple[int, list[int]]]:
    """Each group of patients, and the others, on which a fit is made that is judged on it."""
    for fold in range(FOLDS):
        yield fold, [other for other in range(FOLDS) if other != fold]


def fold_of(patient: str) -> int:
    """The group of patients that a patient belongs to, by a hash of the pseudonym."""
    return int.from_bytes(hashlib.sha256(f"fold/{patient}".encode()).digest()[:4]) % FOLDS


def flat_size(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers the sums of a layout are."""
    return sum(math.prod(shape) for shape in shapes.values())


def flatten(state: State, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """Sums as one vector, float64."""
    return torch.cat([state[name].double().reshape(-1) for name in shapes])


def unflatten(vector: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> State:
    """The sums that `flatten` made a vector `(flat_size,)` of, by name and in their shapes."""
    parts = vector.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _test_matrix(latent_size: int, seed: int) -> Tensor:
    shape = latent_size, directions_of(latent_size)
    drawn = torch.randn(shape, generator=torch_generator(seed, "longitudinal sketch"), dtype=torch.float64)
    return drawn / latent_size**0.5
