"""Longitudinal drift: sums over sites give the pooled fit, a known law is found, and answers follow it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ld_common.core.errors import ConfigError, ReleaseError
from ld_common.core.state import State
from ld_common.diffusion.longitudinal import AttributeChange, LongitudinalDrift
from ld_common.diffusion.longitudinal_fit import fit, fit_tables
from ld_common.diffusion.longitudinal_sums import (
    Basis,
    StructureSizes,
    VisitTable,
    added,
    attribute_features,
    basis_of,
    feature_columns,
    flatten,
    layout,
    sketch,
    sketch_layout,
    sums,
    unflatten,
)

SHAPE = (2, 4, 4)
NUMERIC = [True, False, False]
"""Age, a disease, a sex."""
GROWTH, SEX, BODY = (torch.randn(32, generator=torch.Generator().manual_seed(seed)).double() for seed in (1, 2, 3))
DISEASE_YEARS, HALF_RANGE = 12.0, 41.0


def simulated(site: int, patients: int, visits: int = 3, noise: float = 0.02) -> VisitTable:
    """Patients whose latents move along `GROWTH` at a rate that their own scan shows, by `BODY`."""
    generator = torch.Generator().manual_seed(site)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    latents, designs, names, days = [], [], [], []
    for patient in range(patients):
        age, rate = 60 + 10 * float(draw(1)), 1 + 0.3 * float(draw(1))
        sick, man = (float(draw(1)) > 0 for _ in range(2))
        for visit in range(visits):
            grown = age + 2 * visit - 60 + DISEASE_YEARS * sick
            place = 0.05 * rate * grown * GROWTH + man * SEX + (rate - 1) * BODY + site + noise * draw(32)
            latents.append(place.view(SHAPE))
            designs.append([(age + 2 * visit - 60) / HALF_RANGE, float(sick), float(man)])
            names.append(f"{site}/{patient}")
            days.append(round(visit * 2 * 365.25))
    return VisitTable.of(torch.stack(latents), designs, NUMERIC, names, days)


@dataclass
class Fitted:
    tables: list[VisitTable]
    basis: Basis
    sums: State
    drift: LongitudinalDrift


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    tables = [simulated(site, 40) for site in range(3)]
    basis = basis_of(added([sketch(table, 0) for table in tables]), 0)
    summed = added([sums(table, basis) for table in tables])
    return Fitted(tables, basis, summed, fit(summed, basis, NUMERIC, torch.zeros(2), SHAPE)[0])


def pooled(tables: list[VisitTable]) -> VisitTable:
    """All rows as one table, each site's visits centred on its own mean and moved to the mean of all."""
    latents, features = (torch.cat([getattr(table, name) for table in tables]) for name in ("latents", "features"))
    shifted = [
        (table.latents - table.latents.mean(0) + latents.mean(0), table.features - table.features.mean(0))
        for table in tables
    ]
    rows = [torch.cat(parts) for parts in zip(*shifted, strict=True)]
    names = [name for table in tables for name in table.patients]
    return VisitTable(rows[0], rows[1] + features.mean(0), names, torch.cat([table.years for table in tables]))


def measured(tables: list[VisitTable], noise: float = 0.0, speed: float = 0.01) -> list[VisitTable]:
    """The tables with a structure whose edge moves by `speed` a year, 1.5 times as fast in the diseased.

    A patient's edge has a length that the latents do not show.
    """
    generator = torch.Generator().manual_seed(9)
    found = []
    for table in tables:
        lengths = {name: 0.5 + float(torch.rand(1, generator=generator)) for name in dict.fromkeys(table.patients)}
        edges = torch.tensor([lengths[name] for name in table.patients], dtype=torch.float64)
        disturbed = noise * torch.randn(len(edges), generator=generator, dtype=torch.float64)
        areas = 0.05 + edges * speed * (1 + 0.5 * table.features[:, 1]) * table.years + disturbed
        found.append(replace(table, structure=StructureSizes(areas, edges)))
    return found


def growth_fit(fitted: Fitted, tables: list[VisitTable]) -> LongitudinalDrift:
    summed = added([sums(table, fitted.basis) for table in tables])
    return fit(summed, fitted.basis, NUMERIC, torch.zeros(2), SHAPE)[0]


def test_the_speed_of_an_edge_is_found_and_longer_edges_add_more_area(fitted: Fitted) -> None:
    drift = growth_fit(fitted, measured(fitted.tables, noise=0.002))
    assert drift.tells_growth
    scan = fitted.tables[0].latents[0].view(SHAPE).float()
    for sick, speed in ((0.0, 0.01), (1.0, 0.015)):
        here, later = (0.2, sick, 0.0), (0.2 + 10 / HALF_RANGE, sick, 0.0)
        asked = AttributeChange(here, here, later, 10.0)
        for edge in (0.5, 1.5):
            assert drift.growth(scan, asked, edge) == pytest.approx(10 * speed * edge, rel=0.08)
        back = AttributeChange(here, here, (0.2 - 10 / HALF_RANGE, sick, 0.0), -10.0)
        assert drift.growth(scan, back, 1.0) < 0
        other_sex = AttributeChange(here, (0.2, sick, 1.0), (0.2, sick, 1.0), 0.0)
        assert drift.growth(scan, other_sex, 1.0) == 0
    well, sick_now = (0.2, 0.0, 0.0), (0.2, 1.0, 0.0)
    added, removed = (AttributeChange(a, b, b, 0.0) for a, b in ((well, sick_now), (sick_now, well)))
    # the years of the disease pass as they do with the disease, added or taken away
    assert drift.growth(scan, added, 1.0) == pytest.approx(DISEASE_YEARS * 0.015, rel=0.1)
    assert drift.growth(scan, removed, 1.0) == pytest.approx(-DISEASE_YEARS * 0.015, rel=0.1)


def test_an_edit_is_its_steps_one_after_the_other(fitted: Fitted) -> None:
    drift, scan = fitted.drift, fitted.tables[0].latents[0].view(SHAPE).float()
    here, switched, later = (0.2, 0.0, 0.0), (0.2, 1.0, 1.0), (0.5, 1.0, 1.0)
    asked = AttributeChange(here, switched, later, 0.3 * HALF_RANGE)
    steps = drift.steps(asked)
    assert [(step.source, step.target) for step in steps] == [
        (here, (0.2, 0.0, 1.0)),  # sex, which does not act like years
        ((0.2, 0.0, 1.0), switched),
        (switched, later),
    ]
    assert [drift.elapsed(step) for step in steps] == [
        0.0,
        pytest.approx(DISEASE_YEARS, rel=0.1),
        pytest.approx(0.3 * HALF_RANGE),
    ]
    moved = scan
    for step in steps:
        moved = moved + drift.change(moved, step)
    assert torch.allclose(moved - scan, drift.change(scan, asked), atol=1e-5)
    assert drift.steps(AttributeChange(here, here, here, 0.0)) == []
    assert torch.equal(drift.change(scan, AttributeChange(here, here, here, 0.0)), torch.zeros(SHAPE))


def test_a_disease_acts_like_the_same_years_at_every_age(fitted: Fitted) -> None:
    columns = feature_columns(NUMERIC)
    assert [columns[row] for row in fitted.drift.years.nonzero().flatten().tolist()] == [(1,)]
    # and its effect on patients of other ages, which is noise here, does not move the scan
    disturbed = replace(fitted.drift, effect=fitted.drift.effect.clone())
    row = columns.index((0, 1))
    disturbed.effect[row] += 5.0
    scan = fitted.tables[0].latents[0].view(SHAPE).float()
    added = AttributeChange((0.5, 0.0, 0.0), (0.5, 1.0, 0.0), (0.5, 1.0, 0.0), 0.0)
    assert torch.equal(disturbed.change(scan, added), fitted.drift.change(scan, added))


def test_the_sums_of_growth_add_up_over_sites_to_those_of_all_visits(fitted: Fitted) -> None:
    tables = measured(fitted.tables, noise=0.002)
    together = VisitTable(
        torch.cat([table.latents for table in tables]),
        torch.cat([table.features for table in tables]),
        [name for table in tables for name in table.patients],
        torch.cat([table.years for table in tables]),
        StructureSizes(
            *(torch.cat([getattr(table.structure, name) for table in tables]) for name in ("areas", "edges"))
        ),
    )
    pooled_sums, summed = sums(together, fitted.basis), added([sums(table, fitted.basis) for table in tables])
    for name in ("growth_features", "growth_areas", "growth_years"):
        assert torch.allclose(pooled_sums[name], summed[name], rtol=1e-10, atol=1e-12), name


def test_a_structure_that_is_measured_badly_or_not_at_all_gives_no_growth(fitted: Fitted) -> None:
    assert not fitted.drift.tells_growth
    generator = torch.Generator().manual_seed(3)
    shuffled = []
    for table in measured(fitted.tables):
        assert table.structure is not None
        areas = 0.05 + 0.01 * table.years + 0.02 * torch.randn(len(table.years), generator=generator).double()
        edges = 0.2 + 2 * torch.rand(len(table.years), generator=generator).double()  # tells nothing
        shuffled.append(replace(table, structure=StructureSizes(areas, edges)))
    assert not growth_fit(fitted, shuffled).tells_growth


def test_the_sum_over_sites_is_the_pooled_fit_between_patients(fitted: Fitted) -> None:
    together = sums(pooled(fitted.tables), fitted.basis)
    for name in ("across_features", "across_parts", "across_spread", "across_latents"):
        assert torch.allclose(together[name], fitted.sums[name], rtol=1e-9, atol=1e-9)
    alone = pooled(fitted.tables)
    features = alone.features - alone.features.mean(0)
    gram = features.T @ features + 0.001 * len(features) * torch.eye(features.shape[1], dtype=torch.float64)
    effect = torch.linalg.solve(gram, features.T @ (alone.latents - alone.latents.mean(0)))
    assert torch.allclose(fitted.drift.effect.double(), effect, atol=1e-5)


def test_the_sum_over_sites_is_the_pooled_fit_within_patients(fitted: Fitted) -> None:
    tables = fitted.tables
    rows = VisitTable(
        torch.cat([table.latents for table in tables]),
        torch.cat([table.features for table in tables]),
        [name for table in tables for name in table.patients],
        torch.cat([table.years for table in tables]),
    )
    together = sums(rows, fitted.basis)
    for name in ("pairs", "time_features", "time_parts", "time_energy", "time_spread", "time_latents"):
        assert torch.allclose(together[name], fitted.sums[name], rtol=1e-10, atol=1e-9)


def test_a_common_factor_changes_nothing(fitted: Fitted) -> None:
    third = {name: value / 3 for name, value in fitted.sums.items()}
    again, _ = fit(third, fitted.basis, NUMERIC, torch.zeros(2), SHAPE)
    for name, value in fitted.drift.state().items():
        assert torch.allclose(again.state()[name], value, rtol=1e-4, atol=1e-5), name


def test_the_sketch_spans_what_latents_vary_in(fitted: Fitted) -> None:
    latents = torch.cat([table.latents for table in fitted.tables])
    energy = fitted.basis.energy(fitted.basis.parts(latents)).sum()
    assert float(energy / (latents - fitted.basis.mean).square().sum()) > 0.999


def test_change_follows_the_rate_that_the_patients_own_scan_shows(fitted: Fitted) -> None:
    table = simulated(7, 60, visits=2, noise=0.0)
    drift, true, drawn = fitted.drift, [], []
    for first, second in table.pairs():
        design = table.features[first][:3].tolist()
        later = [design[0] + 2 / HALF_RANGE, *design[1:]]
        asked = AttributeChange(tuple(design), tuple(design), tuple(later), 2.0)
        change = drift.change((table.latents[first] - 7 + 1).view(SHAPE).float(), asked).flatten().double()
        true.append(float((table.latents[second] - table.latents[first]) @ GROWTH))
        drawn.append(float(change @ GROWTH))
    correlation = float(torch.corrcoef(torch.tensor([true, drawn]))[0, 1])
    assert correlation > 0.9
    assert 0.85 < sum(drawn) / sum(true) < 1.15


def test_a_disease_that_ages_acts_like_years_and_sex_does_not(fitted: Fitted) -> None:
    columns = feature_columns(NUMERIC)
    assert columns == [(0,), (1,), (2,), (0, 1), (0, 2)]
    years = fitted.drift.years
    assert float(years[0]) == 0.0
    assert float(years[1]) == pytest.approx(DISEASE_YEARS, abs=2.5)
    assert float(years[2]) == 0.0
    assert float(years[4]) == 0.0
    design = (0.2, 0.0, 0.0)
    other_sex = AttributeChange(design, (0.2, 0.0, 1.0), (0.2, 0.0, 1.0), 0.0)
    changed = fitted.drift.change(torch.zeros(SHAPE), other_sex).flatten().double()
    assert float(torch.cosine_similarity(changed, SEX, dim=0)) > 0.98


def test_no_change_is_asked_and_none_is_made(fitted: Fitted) -> None:
    scan = fitted.tables[0].latents[0].view(SHAPE).float()
    design = (0.1, 1.0, 0.0)
    assert torch.equal(fitted.drift.change(scan, AttributeChange(design, design, design, 0.0)), torch.zeros(SHAPE))


def test_years_back_undo_years_on(fitted: Fitted) -> None:
    scan = fitted.tables[0].latents[0].view(SHAPE).float()
    design, later = (0.1, 0.0, 0.0), (0.1 + 10 / HALF_RANGE, 0.0, 0.0)
    there = scan + fitted.drift.change(scan, AttributeChange(design, design, later, 10.0))
    back = there + fitted.drift.change(there, AttributeChange(later, later, design, -10.0))
    assert float((back - scan).norm() / (there - scan).norm()) < 0.1


def test_sampling_starts_at_the_mean_of_the_attributes(fitted: Fitted) -> None:
    rows = torch.cat([table.features[:, :3] for table in fitted.tables])
    latents = torch.cat([table.latents for table in fitted.tables])
    mean = fitted.drift.at(rows.tolist()).mean.flatten(1).double()
    assert mean.shape == latents.shape
    assert torch.allclose(mean.mean(0), latents.mean(0), atol=1e-4)
    women, men = (mean[rows[:, 2] == sex].mean(0) for sex in (0, 1))
    assert float(torch.cosine_similarity(men - women, SEX, dim=0)) > 0.9


def test_features_are_the_vector_and_products_of_numbers_and_categories() -> None:
    row = attribute_features(torch.tensor([[2.0, 3.0, 5.0]]), NUMERIC)
    assert row.tolist() == [[2.0, 3.0, 5.0, 6.0, 10.0]]


def test_sums_travel_as_one_vector(fitted: Fitted) -> None:
    for state, shapes in (
        (sketch(fitted.tables[0], 0), sketch_layout(32)),
        (sums(fitted.tables[0], fitted.basis), layout(32, 5)),
        (sums(measured(fitted.tables)[0], fitted.basis), layout(32, 5)),
    ):
        vector = flatten(state, shapes)
        assert vector.dtype == torch.float64
        back = unflatten(vector, shapes)
        assert all(torch.equal(back[name], state[name]) for name in shapes)


def test_patients_with_one_visit_alone_have_no_change_to_learn(fitted: Fitted) -> None:
    table = simulated(0, 20, visits=1)
    basis = basis_of(sketch(table, 0), 0)
    with pytest.raises(ConfigError, match="two visits"):
        fit(sums(table, basis), basis, NUMERIC, torch.zeros(2), SHAPE)
    with pytest.raises(ConfigError, match="no two visits that differ"):
        basis_of({name: torch.zeros(shape).double() for name, shape in sketch_layout(32).items()}, 0)


def test_a_release_with_other_tensors_is_refused(fitted: Fitted, tmp_path: Path) -> None:
    state = fitted.drift.state()
    read = LongitudinalDrift.from_state(state)
    assert all(torch.equal(read.state()[name], value) for name, value in state.items())
    for broken in (
        {name: value for name, value in state.items() if name != "longitudinal.years"},
        {**state, "longitudinal.more": torch.zeros(1)},
        {**state, "longitudinal.yearly": torch.zeros(3, 3)},
        {**state, "longitudinal.mean": torch.full((32,), math.nan)},
        {**state, "longitudinal.latent_shape": torch.tensor([3.0, 4.0, 4.0])},
    ):
        with pytest.raises(ReleaseError, match="longitudinal drift"):
            LongitudinalDrift.from_state(broken)


def test_folds_split_patients_not_visits(fitted: Fitted) -> None:
    table = fitted.tables[0]
    renamed = replace(table, patients=["one"] * len(table.patients))
    pairs = sums(renamed, fitted.basis)["pairs"]
    assert sorted(pairs.tolist())[:3] == [0.0, 0.0, 0.0]


def with_mirror_images(table: VisitTable) -> VisitTable:
    """The visits, and those that a mirror shows of them: of the same patients, measured alike."""
    return table.beside(table.latents.view(-1, *SHAPE).flip(-1).flatten(1))


def test_a_drift_that_saw_mirror_images_moves_a_mirrored_scan_as_the_mirror_of_its_answer(fitted: Fitted) -> None:
    tables = [with_mirror_images(table) for table in fitted.tables]
    drift = fit_tables(tables, NUMERIC, torch.zeros(2), SHAPE)[0]
    scan = fitted.tables[0].latents[0].view(SHAPE).float()
    here, later = (0.1, 0.0, 1.0), (0.1 + 10 / HALF_RANGE, 1.0, 0.0)
    asked = AttributeChange(here, (0.1, 1.0, 0.0), later, 10.0)
    for found, tolerance in ((drift, 0.01), (fitted.drift, None)):
        answer, mirrored = found.change(scan, asked), found.change(scan.flip(-1), asked)
        apart = float((mirrored.flip(-1) - answer).norm() / answer.norm())
        assert apart < tolerance if tolerance else apart > 0.1


def test_mirror_images_are_paired_with_mirror_images_of_their_own_patient(fitted: Fitted) -> None:
    plain, both = fitted.tables[0], with_mirror_images(fitted.tables[0])
    rows = len(plain.patients)
    assert sorted(both.pairs()) == sorted(
        [*plain.pairs(), *((first + rows, second + rows) for first, second in plain.pairs())]
    )


def test_a_table_is_made_with_the_measures_of_the_visits_that_are_mirrored() -> None:
    latents = torch.randn(3, *SHAPE)
    sizes = StructureSizes(torch.arange(3).double(), torch.ones(3).double())
    table = VisitTable.of(
        latents, [[0.0, 0.0, 1.0]] * 3, NUMERIC, ["a", "a", "b"], [0, 365, 0], sizes, latents.flip(-1)
    )
    assert table.structure is not None
    assert table.structure.areas.tolist() == [0, 1, 2, 0, 1, 2] and list(table.patients) == ["a", "a", "b"] * 2
    assert torch.equal(table.latents[3:].view(3, *SHAPE), latents.flip(-1).double())
    assert table.pairs() == [(0, 1), (3, 4)]
