"""Fits a longitudinal drift to the noised vectors of `private_longitudinal`: the public drift and its corrections.

The ridge pulls towards the public drift, and its weight grows with the noise, whose size is public:

    ΔC = (G + λ + ν)⁻¹ (B - (1 - PUBLIC_SHARE) λ C),    λ = g · time_ridge,  ν = NOISE_RIDGE · s √n

with C the public drift, G and B the noised sums of x xᵀ and x rᵀ, n numbers in x, g the sum of squared years between
visits (the first number of G), and s the deviation of the noise on G's diagonal. For differences between patients g is
their number. G's negative eigenvalues, which only noise gives, are set to 0. Where a category acts like τ years among
the public patients, it acts like τ + k d of them: τ + d is what its corrected effect at the mean age is worth in years
of the corrected change, k = max(0, 1 - v / d²), and v the variance that the noise gives d. Nothing else looks at the
patients, so no cross-validation needs a budget. What the vectors do not cover (spreads, which categories act like
years) stays as the public patients have it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.diffusion.longitudinal_sums import feature_columns, regressors
from ld_common.diffusion.public_basis import PublicBasis, public_deviations, symmetric

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
    change = corrected(gram, cross, ridge, noise.regressions / scales["time_features"])[0]
    gram = symmetric(regressions["across_features"], basis.features)
    ridge = patients * EFFECT_RIDGE * torch.ones(basis.features).double()
    deviation = noise.regressions / scales["across_features"]
    effect, inverse = corrected(gram, regressions["across_missed"], ridge, deviation)
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
    noises = inverse * noise.regressions / scales["across_missed"]
    fitted = replace(fitted, years=_years(fitted, basis, features, (noises, onto_parts)))
    return LongitudinalDrift.from_state({name: value.float() for name, value in fitted.state().items()})


def time_ridge(basis: PublicBasis) -> Tensor:
    """Ridge of each number of x without noise, a squared year, `(n,)`."""
    rows = [INTERCEPT_RIDGE] + [FEATURE_RIDGE] * basis.features + [PART_RIDGE] * basis.parts
    return torch.tensor(rows, dtype=torch.float64)


def corrected(gram: Tensor, cross: Tensor, ridge: Tensor, deviation: float) -> tuple[Tensor, Tensor]:
    """The ridge solution `(n,M)` of noised sums, and the matrix `(n,n)` by which it is `cross`.

    Args:
        gram: `(n,n)`, symmetric.
        cross: `(n,M)`.
        ridge: penalties without noise `(n,)`.
        deviation: standard deviation of the noise on the diagonal of `gram`.
    """
    values, vectors = torch.linalg.eigh(gram)
    positive = vectors * values.clamp_min(0) @ vectors.T
    penalty = ridge + NOISE_RIDGE * deviation * len(gram) ** 0.5 + LEAST_RIDGE
    inverse = torch.linalg.inv(positive + torch.diag(penalty))
    return inverse @ cross, inverse


def _years(fitted: LongitudinalDrift, basis: PublicBasis, features: Tensor, noise: tuple[Tensor, Tensor]) -> Tensor:
    """τ of each feature `(F,)`, where the category acts like years among the public patients.

    Args:
        fitted: with the corrected effects and changes.
        basis: the study's.
        features: their mean `(F,)`.
        noise: what turns noise of unit deviation into noise on the effects `(F,F)`; the directions of change in parts
            `(M,K)`.
    """
    public, (noises, onto_parts) = basis.public, noise
    variances = public_deviations(public).square()
    metric = torch.linalg.inv(public.part_spread.double() + torch.diag(variances.mean() / variances))
    mean = fitted.part_mean.double() + features @ fitted.part_effect.double()
    yearly = fitted.yearly.double() @ public.directions.double().T
    typical = regressors(features[None], mean[None])[0] @ yearly
    reading = metric @ typical / (typical @ metric @ typical)
    years, columns = public.years.double().clone(), feature_columns([bool(number) for number in public.numeric])
    for row in [row for row in years.nonzero().flatten().tolist() if len(columns[row]) == 1]:
        at_mean = torch.zeros_like(years)
        for other, of in enumerate(columns):
            if columns[row][0] in of:  # itself, or its product with a number
                at_mean[other] = 1.0 if len(of) == 1 else features[next(one for one in of if one != columns[row][0])]
        found = float(at_mean @ fitted.part_effect.double() @ reading) - float(years[row])
        variance = float((at_mean @ noises).square().sum() * (onto_parts @ reading).square().sum())
        years[row] += found * max(0.0, 1 - variance / max(found**2, 1e-12))
    return years
