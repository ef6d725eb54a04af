"""What a patient contributes to a longitudinal drift under differential privacy: one short vector in a public basis.

What the public drift predicts is subtracted, so that sites report only what it misses, along the directions V of
`public_basis`. With parts p and features φ as in `longitudinal_sums`:

    x = h [1, φ, p],  r = V (z' - z - predicted change)     of a pair of visits z, z', h years apart
    q = V (z - predicted mean)                              of a visit

    means           1, φ, q                of the patient's mean visit
    regressions     x xᵀ, x rᵀ             means over the patient's pairs
                    φ φᵀ, φ qᵀ             of the patient's mean visit, φ and q less the site's (noised) means
"""

from __future__ import annotations

import torch
from torch import Tensor

from ld_common.core.state import State
from ld_common.diffusion.longitudinal_sums import VisitTable, regressors
from ld_common.diffusion.public_basis import CHANGES, PARTS, PublicBasis, triangle

MEANS_SHARE = 0.1
"""Of the query's privacy, for the means; the regressions, which are centred on them, have the rest."""


def mean_vectors(table: VisitTable, basis: PublicBasis) -> Tensor:
    """Each patient's means, scaled, `(P, ...)` in the order of `means_layout`."""
    features, missed, count = _patient_means(table, basis)
    return basis.scaled({"patients": torch.ones(count, 1).double(), "features": features, "missed": missed})


def regression_vectors(table: VisitTable, basis: PublicBasis, means: State) -> Tensor:
    """Each patient's regressions, scaled, `(P, ...)` in the order of `regressions_layout`.

    Args:
        table: the site's visits.
        basis: the study's.
        means: the site's, noised, of `site_means`.
    """
    features, missed, count = _patient_means(table, basis)
    features, missed = features - means["features"], missed - means["missed"]
    squares, products = _pair_products(table, basis, count)
    return basis.scaled(
        {
            "time_features": triangle(squares),
            "time_changes": products,
            "across_features": triangle(features[:, :, None] * features[:, None, :]),
            "across_missed": features[:, :, None] * missed[:, None, :],
        }
    )


def _pair_products(table: VisitTable, basis: PublicBasis, count: int) -> tuple[Tensor, Tensor]:
    """Means of x xᵀ `(P,n,n)` and x rᵀ `(P,n,M)` over each patient's pairs."""
    row, public = basis.row, basis.public
    squares = torch.zeros(count, row, row).double()
    products = torch.zeros(count, row, len(basis.changes)).double()
    pairs = table.pairs()
    if pairs:
        first, second = (torch.tensor([pair[side] for pair in pairs]) for side in (0, 1))
        years = (table.years[second] - table.years[first])[:, None]
        parts = (table.latents[first] - public.centre.double()) @ public.directions.double().T
        read = years * regressors(table.features[first], parts)
        moved = table.latents[second] - table.latents[first]
        rest = (moved - read @ public.yearly.double()) @ basis.changes.T
        read, own = read[:, :row], _owners(table)[first]
        share = (1 / torch.bincount(own, minlength=count).clamp_min(1).double())[own][:, None, None]
        squares.index_add_(0, own, share * read[:, :, None] * read[:, None, :])
        products.index_add_(0, own, share * read[:, :, None] * rest[:, None, :])
    return squares, products


def _patient_means(table: VisitTable, basis: PublicBasis) -> tuple[Tensor, Tensor, int]:
    """φ `(P,F)` and q `(P,M)` of the patients' mean visits, and P."""
    owners = _owners(table)
    expected = basis.public.mean.double() + table.features @ basis.public.effect.double()
    missed = (table.latents - expected) @ basis.changes.T
    count = int(owners.max()) + 1 if len(owners) else 0
    visits = torch.bincount(owners, minlength=count).double()[:, None]
    features, means = (
        torch.zeros(count, value.shape[1]).double().index_add_(0, owners, value) / visits
        for value in (table.features, missed)
    )
    return features, means, count


def _owners(table: VisitTable) -> Tensor:
    """Each visit's patient by number, `(N,)`."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(patient, len(numbers)) for patient in table.patients], dtype=torch.long)


def site_means(means: State) -> State:
    """Means of φ and q over patients, from noised sums of `PublicBasis.split`."""
    patients = float(means["patients"].clamp_min(1.0))
    return {name: means[name] / patients for name in ("features", "missed")}


def noise_deviations(noise_multiplier: float, clip_norm: float) -> tuple[float, float]:
    """Standard deviation of the noise on each of the means and of the regressions of a site.

    Means and regressions are two Gaussian mechanisms, the second chosen by the first. With noise multipliers a and b
    they compose exactly to one of (1/a² + 1/b²)^(-1/2) (arXiv 1905.02383, corollary 3.3): `noise_multiplier`.
    """
    return noise_multiplier * clip_norm / MEANS_SHARE**0.5, noise_multiplier * clip_norm / (1 - MEANS_SHARE) ** 0.5


def signal_to_noise(noise_multiplier: float, patients: int, sites: int, features: int) -> float:
    """A coefficient's signal over its noise in the sum over sites, if all patients agree and all are clipped.

    patients · √sites / (noise multiplier · √numbers): each patient's norm is spread over the numbers of x rᵀ; the clip
    norm cancels.

    Args:
        noise_multiplier: of the whole query.
        patients: of each site.
        sites: that are added up.
        features: F.
    """
    deviation = noise_deviations(noise_multiplier, 1.0)[1]
    return float(patients * sites**0.5 / (deviation * ((1 + features + PARTS) * CHANGES) ** 0.5))
