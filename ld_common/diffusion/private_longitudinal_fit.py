"""Fits a longitudinal drift to the noised vectors of `private_longitudinal`: the public drift and its corrections.

The ridge pulls towards the public drift, and its weight grows with the noise, whose size is public:

    ΔC = (G + λ + ν)⁻¹ (B - (1 - PUBLIC_SHARE) λ C),    λ = g · time_ridge,  ν = NOISE_RIDGE · s √n

with C the public drift, G and B the noised sums of x xᵀ and x rᵀ, n numbers in x, g the sum of squared years between
visits (the first number of G), and s the deviation of the noise on G's diagonal. For differences between patients g is
their number. G's negative eigenvalues, which only noise gives, are set to 0. Nothing else looks at the patients, so no
cross-validation needs a budget. What the vectors do not cover (spreads, years of categories) stays as the public
patients have it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.diffusion.public_basis import PublicBasis, symmetric

PART_RIDGE, FEATURE_RIDGE, INTERCEPT_RIDGE = 0.5, 0.1, 0.001
"""Ridge a squared year; parts have unit variance among public patients."""
PUBLIC_SHARE = 0.8
"""Share of the public drift's change to which the ridge without noise pulls; the one for noise pulls to all of it."""
EFFECT_RIDGE = 0.002
"""Ridge of a feature between patients, a patient."""
NOISE_RIDGE = 1.5
"""Ridge by the norm of the noise; chosen on simulated patients."""
LEAST_RIDGE = 1e-9


@dataclass(frozen=True)
class SumNoise:
    """Standard deviations of the noise on a sum of sites' vectors."""

    means: float = 0.0
    regressions: float = 0.0


def fit_private(summed: Tensor, basis: PublicBasis, noise: SumNoise) -> LongitudinalDrift:
    """The public drift, corrected by the sum of the sites' vectors.

    Args:
        summed: the sum over sites, `(basis.size,)` float64.
        basis: the one that they were computed with.
        noise: on each of its numbers.
    """
    public, scales, (means, regressions) = basis.public, basis.scales, basis.split(summed)
    patients = float(means["patients"].clamp_min(1.0))
    gram = symmetric(regressions["time_features"], basis.row)
    ridge = max(float(gram[0, 0]), 0.0) * time_ridge(basis)
    predicted = public.yearly.double()[: basis.row] @ basis.changes.T
    cross = regressions["time_changes"] - (1 - PUBLIC_SHARE) * ridge[:, None] * predicted
    change = corrected(gram, cross, ridge, noise.regressions / scales["time_features"])
    gram = symmetric(regressions["across_features"], basis.features)
    ridge = patients * EFFECT_RIDGE * torch.ones(basis.features).double()
    effect = corrected(gram, regressions["across_missed"], ridge, noise.regressions / scales["across_features"])
    features, missed = means["features"] / patients, means["missed"] / patients
    variance = (noise.means / scales["missed"] / patients) ** 2 * len(missed)
    kept = max(0.0, 1 - variance / max(float(missed.square().sum()), 1e-12))  # James and Stein's shrinkage
    mean = kept * missed - features @ effect
    yearly = public.yearly.double()
    yearly[: basis.row] += change @ basis.changes
    onto_parts = basis.changes @ public.directions.double().T
    fitted = replace(
        public,
        yearly=yearly,
        effect=public.effect.double() + effect @ basis.changes,
        mean=public.mean.double() + mean @ basis.changes,
        part_effect=public.part_effect.double() + effect @ onto_parts,
        part_mean=public.part_mean.double() + mean @ onto_parts,
    )
    return LongitudinalDrift.from_state({name: value.float() for name, value in fitted.state().items()})


def time_ridge(basis: PublicBasis) -> Tensor:
    """Ridge of each number of x without noise, a squared year, `(n,)`."""
    rows = [INTERCEPT_RIDGE] + [FEATURE_RIDGE] * basis.features + [PART_RIDGE] * basis.parts
    return torch.tensor(rows, dtype=torch.float64)


def corrected(gram: Tensor, cross: Tensor, ridge: Tensor, deviation: float) -> Tensor:
    """The ridge solution `(n,M)` of noised sums.

    Args:
        gram: `(n,n)`, symmetric.
        cross: `(n,M)`.
        ridge: penalties without noise `(n,)`.
        deviation: standard deviation of the noise on the diagonal of `gram`.
    """
    values, vectors = torch.linalg.eigh(gram)
    positive = vectors * values.clamp_min(0) @ vectors.T
    penalty = ridge + NOISE_RIDGE * deviation * len(gram) ** 0.5 + LEAST_RIDGE
    return torch.linalg.solve(positive + torch.diag(penalty), cross)
