"""A private longitudinal drift: one patient moves the sums by the clip norm at most, and the fit bears the noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ld_client.privacy.dp_longitudinal import clipped_sum, noised_vector
from ld_common.core.errors import AdapterError
from ld_common.core.state import State
from ld_common.diffusion.longitudinal import AttributeChange, LongitudinalDrift
from ld_common.diffusion.longitudinal_fit import fit
from ld_common.diffusion.longitudinal_sums import VisitTable, basis_of, feature_columns, regressors, sketch, sums
from ld_common.diffusion.private_longitudinal import (
    MEANS_SHARE,
    mean_vectors,
    noise_deviations,
    regression_vectors,
    signal_to_noise,
    site_means,
)
from ld_common.diffusion.private_longitudinal_fit import EFFECT_RIDGE, PUBLIC_SHARE, SumNoise, fit_private, time_ridge
from ld_common.diffusion.public_basis import CHANGES, PublicBasis, symmetric, triangle
from ld_common.protocol.dp_accounting import Charge, DpConfig, epsilon
from tests.diffusion.test_longitudinal import DISEASE_YEARS, GROWTH, NUMERIC, SHAPE, simulated, with_mirror_images


@pytest.fixture(scope="module")
def public() -> LongitudinalDrift:
    """Of 30 patients who change half as fast as the sites' do."""
    table = simulated(20, 30)
    latents = table.latents - 20
    slower = replace(table, latents=latents - 0.5 * (latents @ GROWTH)[:, None] * GROWTH / (GROWTH @ GROWTH))
    basis = basis_of(sketch(slower, 0), 0)
    return fit(sums(slower, basis), basis, NUMERIC, torch.zeros(2), SHAPE)[0]


@pytest.fixture(scope="module")
def basis(public: LongitudinalDrift) -> PublicBasis:
    return PublicBasis.of(public)


def some(table: VisitTable, rows: Tensor) -> VisitTable:
    names = [table.patients[row] for row in rows.tolist()]
    mirrored = [table.mirrored[row] for row in rows.tolist()] if table.mirrored else []
    return VisitTable(table.latents[rows], table.features[rows], names, table.years[rows], mirrored=mirrored)


def without(table: VisitTable, patient: str) -> VisitTable:
    return some(table, torch.tensor([row for row, owner in enumerate(table.patients) if owner != patient]))


def exact(table: VisitTable, basis: PublicBasis) -> Tensor:
    """A site's sums without clipping and noise."""
    means = mean_vectors(table, basis).sum(0)
    return torch.cat([means, regression_vectors(table, basis, centre_of(means, basis)).sum(0)])


def centre_of(means: Tensor, basis: PublicBasis) -> State:
    return site_means(basis.split(torch.cat([means, torch.zeros(basis.size - len(means)).double()]))[0])


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_one_patient_changes_the_sums_by_the_clip_norm_at_most(basis: PublicBasis, seed: int, mirror: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = simulated(seed, 12, visits=1 + seed, noise=0.5)
    table = with_mirror_images(table) if mirror else table
    wild = replace(table, latents=table.latents * torch.randn(len(table.latents), 1, generator=generator).exp())
    norm = float(torch.rand(1, generator=generator)) * 5 + 0.1
    centre = centre_of(clipped_sum(mean_vectors(wild, basis), norm), basis)
    whole = clipped_sum(mean_vectors(wild, basis), norm), clipped_sum(regression_vectors(wild, basis, centre), norm)
    moved = []
    for patient in set(wild.patients):
        others = without(wild, patient)
        means = clipped_sum(mean_vectors(others, basis), norm)
        regressions = clipped_sum(regression_vectors(others, basis, centre), norm)
        moved.append([float((whole[0] - means).norm()), float((whole[1] - regressions).norm())])
    assert max(map(max, moved)) <= norm * (1 + 1e-9)
    assert max(map(max, moved)) > 0.99 * norm  # somebody is clipped, so the bound is met


def test_a_patient_whose_latents_are_not_finite_changes_nothing(basis: PublicBasis) -> None:
    table = simulated(1, 6)
    broken = replace(table, latents=table.latents.clone())
    broken.latents[0] = torch.nan
    broken.latents[1] = 1e200
    others = without(table, table.patients[0])
    centre = centre_of(clipped_sum(mean_vectors(others, basis), 4.0), basis)
    for vectors in (lambda rows: mean_vectors(rows, basis), lambda rows: regression_vectors(rows, basis, centre)):
        assert torch.allclose(clipped_sum(vectors(broken), 4.0), clipped_sum(vectors(others), 4.0), atol=1e-9)


@pytest.mark.slow
def test_noise_has_the_size_that_is_accounted(basis: PublicBasis) -> None:
    privacy, table = DpConfig(drift_noise_multiplier=50.0, drift_clip_norm=2.0), simulated(1, 1)
    drawn = torch.stack([noised_vector(table, basis, privacy) for _ in range(400)]).std(0)
    count = len(mean_vectors(table, basis)[0])
    means, regressions = noise_deviations(50.0, 2.0)
    assert float(drawn[:count].mean()) == pytest.approx(means, rel=0.03)
    assert float(drawn[count:].mean()) == pytest.approx(regressions, rel=0.03)


def test_means_and_regressions_cost_what_one_query_costs() -> None:
    means, regressions = noise_deviations(1.5, 1.0)
    assert 0 < MEANS_SHARE < 1
    both = epsilon([Charge(means, 1.0, 1), Charge(regressions, 1.0, 1)], 1e-5)
    assert both == pytest.approx(epsilon([Charge(1.5, 1.0, 1)], 1e-5), rel=2e-3)


def test_a_matrix_keeps_its_norm_as_a_vector() -> None:
    drawn = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    matrices = drawn + drawn.transpose(1, 2)
    vectors = triangle(matrices)
    assert torch.allclose(vectors.norm(dim=1), matrices.flatten(1).norm(dim=1))
    assert torch.allclose(symmetric(vectors[1], 5), matrices[1])


def test_without_noise_the_fit_is_the_ridge_solution_of_all_patients(basis: PublicBasis) -> None:
    public, table = basis.public, simulated(1, 40)
    found = fit_private(exact(table, basis), basis, SumNoise())
    parts = (table.latents - public.centre) @ public.directions.T.double()
    rows, rest, weights = [], [], []
    for first, second in table.pairs():
        years = table.years[second] - table.years[first]
        row = years * regressors(table.features[first : first + 1], parts[first : first + 1])[0]
        rows.append(row[: basis.row])
        rest.append(table.latents[second] - table.latents[first] - row @ public.yearly.double())
        weights.append(1 / 3)  # three pairs a patient
    read, missed, weight = torch.stack(rows), torch.stack(rest) @ basis.changes.T, torch.tensor(weights).double()
    gram = read.T @ (weight[:, None] * read)
    penalty = torch.diag(gram[0, 0] * time_ridge(basis))
    pull = penalty @ ((PUBLIC_SHARE - 1) * public.yearly[: basis.row].double() @ basis.changes.T)
    change = torch.linalg.solve(gram + penalty, read.T @ (weight[:, None] * missed) + pull) @ basis.changes
    expected = public.yearly.double()
    expected[: basis.row] += change
    assert torch.allclose(found.yearly.double(), expected, atol=1e-5)
    owners = torch.arange(len(table.latents)) // 3
    features, missed = (
        torch.zeros(40, value.shape[1]).double().index_add_(0, owners, value) / 3
        for value in (
            table.features,
            (table.latents - public.mean - table.features @ public.effect.double()) @ basis.changes.T,
        )
    )
    centred = features - features.mean(0)
    gram = centred.T @ centred
    penalty = EFFECT_RIDGE * 40 * torch.eye(len(gram)).double()
    effect = torch.linalg.solve(gram + penalty, centred.T @ (missed - missed.mean(0)))
    assert torch.allclose(found.effect.double(), public.effect + effect @ basis.changes, atol=1e-4)
    mean = public.mean + (missed.mean(0) - features.mean(0) @ effect) @ basis.changes
    assert torch.allclose(found.mean.double(), mean, atol=1e-4)


def test_the_sites_faster_change_is_found_and_more_noise_gives_more_of_the_public_drift(basis: PublicBasis) -> None:
    tables = [simulated(site, 40) for site in range(3)]
    tables = [replace(table, latents=table.latents - site) for site, table in enumerate(tables)]
    summed = torch.stack([exact(table, basis) for table in tables]).sum(0)
    design, later = (0.1, 0.0, 0.0), (0.1 + 10 / 41, 0.0, 0.0)
    asked = AttributeChange(design, design, later, 10.0)

    def growth(drift: LongitudinalDrift) -> float:
        scan = drift.centre.view(SHAPE)
        return float(drift.change(scan, asked).flatten().double() @ GROWTH / (GROWTH @ GROWTH))

    drawn = [growth(fit_private(summed, basis, SumNoise(noise, noise))) for noise in (0.0, 30.0, 1e9)]
    alone = growth(basis.public)
    assert 0.4 < drawn[0] < 0.6  # 0.05 a year
    assert 0.2 < alone < 0.3
    assert drawn[0] > drawn[1] > drawn[2]
    assert drawn[2] == pytest.approx(alone, rel=0.01)


def test_noise_alone_leaves_a_drift_that_is_near_the_public_one(basis: PublicBasis) -> None:
    noise = 1000.0
    summed = noise * torch.randn(basis.size, generator=torch.Generator().manual_seed(0)).double()
    found = fit_private(summed, basis, SumNoise(noise, noise))
    public = basis.public
    assert float((found.yearly - public.yearly).norm() / public.yearly.norm()) < 2
    assert all(bool(value.isfinite().all()) for value in found.state().values())
    assert torch.equal(found.part_spread, public.part_spread)


def test_a_basis_travels_and_what_is_none_is_refused(basis: PublicBasis) -> None:
    state = basis.state()
    back = PublicBasis.from_state(state)
    assert torch.equal(back.changes, basis.changes)
    assert back.size == basis.size == len(noised_vector(simulated(1, 3), basis, DpConfig()))
    rows = basis.changes
    assert rows.shape[0] <= CHANGES
    assert torch.allclose(rows @ rows.T, torch.eye(len(rows)).double(), atol=1e-9)
    for broken in (
        {},
        {name: value for name, value in state.items() if name != "changes"},
        {**state, "more": rows},
        {**state, "changes": 2 * rows},
        {**state, "changes": rows[:, :-1]},
        {**state, "changes": torch.full_like(rows, torch.nan)},
        {**state, "longitudinal.effect": torch.zeros(3)},
        {**state, "longitudinal.yearly": torch.zeros(2, 2)},
        {**state, "longitudinal.directions": torch.tensor(1.0)},
        {**state, "longitudinal.mean": torch.full((32,), torch.inf)},
    ):
        with pytest.raises(AdapterError, match="public basis"):
            PublicBasis.from_state(broken)


def test_signal_grows_with_patients_and_sites_and_falls_with_noise() -> None:
    one = signal_to_noise(1.0, 300, 3, 5)
    assert signal_to_noise(1.0, 600, 3, 5) == pytest.approx(2 * one)
    assert signal_to_noise(1.0, 300, 12, 5) == pytest.approx(2 * one)
    assert signal_to_noise(2.0, 300, 3, 5) == pytest.approx(one / 2)


@pytest.mark.slow
def test_the_sites_correct_how_many_years_a_disease_acts_like_unless_noise_hides_it(
    public: LongitudinalDrift, basis: PublicBasis
) -> None:
    disease, sex = (feature_columns(NUMERIC).index((column,)) for column in (1, 2))
    sites = simulated(3, 400)
    worse = replace(sites, latents=sites.latents + 0.05 * DISEASE_YEARS * sites.features[:, 1:2] * GROWTH)
    vector = exact(worse, basis)  # where it acts like twice as many years as among the public patients
    found = fit_private(vector, basis, SumNoise()).years
    assert float(found[disease]) == pytest.approx(2 * DISEASE_YEARS, rel=0.2)
    assert float(found[sex]) == 0.0
    hidden = fit_private(vector, basis, SumNoise(means=1e4, regressions=1e4)).years
    assert float(hidden[disease]) == pytest.approx(float(public.years[disease]), rel=0.1)
