"""Fits a longitudinal drift to the sum of the sites' sums: the ridge, and what acts like years, by cross-validation.

Solving needs only the sums, so a fit over sites is the fit of all visits pooled, with an intercept a site.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ld_common.core.errors import ConfigError
from ld_common.core.state import State
from ld_common.diffusion.edge_growth import fit_edge_speed
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.diffusion.longitudinal_sums import (
    Basis,
    VisitTable,
    added,
    basis_of,
    feature_columns,
    held_back_folds,
    sketch,
    sums,
)

PARTS = (16, 32, 48)
"""Numbers of principal components that are tried."""
PART_PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Ridge of a part of unit variance, a pair."""
FEATURE_PENALTIES = (0.001, 0.01, 0.1, 1.0)
"""Ridge of a feature, a pair."""
EFFECT_PENALTY = 0.001
"""Ridge of a feature between patients, a visit."""
INTERCEPT_PENALTY = 0.001
YEARS_EXPLAIN = 0.5
MOST_YEARS = 30.0
"""Both were chosen on five draws of simulated brain and two of simulated chest patients. Years explain .74 to 1.01 of
the brain's disease, which is 9 to 17 of them, and none of a sex. They explain .63 of the chest's, but as 56 to 62
years, and answers by them are worse."""


@dataclass(frozen=True)
class RidgeChoice:
    """What cross-validation chose."""

    parts: int
    part_penalty: float
    feature_penalty: float
    error: float
    """Of held-back patients, as a share of what predicting no change leaves."""


def fit(
    summed: State,
    basis: Basis,
    numeric: Sequence[bool],
    base_mean: Tensor,
    latent_shape: Sequence[int],
) -> tuple[LongitudinalDrift, RidgeChoice]:
    """Solve the regressions.

    Args:
        summed: the sites' `longitudinal_sums.sums`, added up; a common factor does not matter.
        basis: the one that they were computed with.
        numeric: which columns of the design vector are numbers.
        base_mean: the base's own mean by channel `(C,)`.
        latent_shape: C, h, w.

    Raises:
        ConfigError: no patient of any site has two visits on different days.
    """
    if not float(summed["pairs"].sum()) > 0:
        raise ConfigError("drift.shape longitudinal needs patients with two visits, and no site has any")
    count, visits = len(feature_columns(numeric)), float(summed["visits"][0])
    rotation = _components(summed["across_spread"] / visits, basis.deviations)
    choice = _choose_ridge(summed, rotation, count, basis.deviations)
    rotation = rotation[: choice.parts]
    speed = fit_edge_speed(summed, rotation, count, len(rotation))
    yearly = _solve_time(summed, rotation, count, choice, "time_latents")
    part_yearly = _solve_time(summed, rotation, count, choice, "time_parts") @ rotation.T
    across = summed["across_features"].sum(0), summed["across_parts"].sum(0) @ rotation.T
    effect = _solve_across(across[0], summed["across_latents"], visits)
    part_effect = _solve_across(*across, visits)
    mean_features = summed["features"] / visits
    mean = summed["latents"] / visits - mean_features @ effect
    part_mean = rotation @ basis.parts((summed["latents"] / visits)[None])[0]
    spread = rotation @ summed["across_spread"] @ rotation.T / visits
    spread = spread - part_effect.T @ across[0] @ part_effect / visits
    typical = torch.cat([torch.ones(1, dtype=torch.float64), mean_features, part_mean]) @ part_yearly
    drift = LongitudinalDrift(
        mean=mean,
        effect=effect,
        centre=basis.mean,
        directions=rotation @ basis.directions,
        yearly=yearly,
        years=_years_of_effects(summed, rotation, _metric(spread, rotation, basis.deviations), typical, numeric),
        numeric=torch.tensor([float(number) for number in numeric]),
        part_effect=part_effect,
        part_mean=part_mean - mean_features @ part_effect,
        part_spread=spread,
        change_spread=_change_spread(summed, rotation, part_yearly, count),
        outside=_moments(summed["outside"] / visits),
        edge_speed=speed,
        base_mean=base_mean,
        latent_shape=torch.tensor([float(size) for size in latent_shape]),
    )
    state = {name: value.float().contiguous() for name, value in drift.state().items()}
    return LongitudinalDrift.from_state(state), choice


def fit_tables(
    tables: Sequence[VisitTable], numeric: Sequence[bool], base_mean: Tensor, latent_shape: Sequence[int], seed: int = 0
) -> tuple[LongitudinalDrift, RidgeChoice]:
    """Both rounds for sites whose visits are at hand: sketch, basis, sums and `fit`, whose errors it raises.

    Args:
        tables: a site's visits each.
        numeric: as for `fit`.
        base_mean: as for `fit`.
        latent_shape: as for `fit`.
        seed: of the sketch.
    """
    basis = basis_of(added([sketch(table, seed) for table in tables]), seed)
    return fit(added([sums(table, basis) for table in tables]), basis, numeric, base_mean, latent_shape)


def _components(covariance: Tensor, deviations: Tensor) -> Tensor:
    """Maps `(q',q)` of parts onto principal components of unit variance, largest first, without those that do not vary.

    Args:
        covariance: of the basis' parts `(q,q)`.
        deviations: of latents along the basis' directions `(q,)`, which decide what is large.
    """
    values, vectors = torch.linalg.eigh(deviations[:, None] * covariance * deviations)
    keep = values > 1e-9 * values.max()
    return ((vectors[:, keep] / values[keep].sqrt()).T * deviations).flip(0)


def _row_map(rotation: Tensor, features: int) -> Tensor:
    """Regressors `(1+F+K, 1+F+q)` on principal components from those on the basis' parts."""
    return torch.block_diag(torch.eye(1 + features, dtype=torch.float64), rotation)


def _penalty(parts: int, features: int, part_penalty: float, feature_penalty: float) -> Tensor:
    rows = [INTERCEPT_PENALTY] + [feature_penalty] * features + [part_penalty] * parts
    return torch.diag(torch.tensor(rows, dtype=torch.float64))


def _choose_ridge(summed: State, rotation: Tensor, features: int, deviations: Tensor) -> RidgeChoice:
    """The options of the least error on patients who were held back, each group of patients in turn."""
    nothing = float(summed["time_energy"].sum())
    choices = []
    for parts, part_penalty, feature_penalty in itertools.product(PARTS, PART_PENALTIES, FEATURE_PENALTIES):
        turned = _row_map(rotation[:parts], features)
        grams = turned @ summed["time_features"] @ turned.T
        crosses = turned @ summed["time_parts"] * deviations
        penalty, error = _penalty(len(rotation[:parts]), features, part_penalty, feature_penalty), nothing
        for fold, others in held_back_folds():
            pairs = summed["pairs"][others].sum()
            if float(pairs) > 0:
                solved = torch.linalg.solve(grams[others].sum(0) + pairs * penalty, crosses[others].sum(0))
                error += float((solved * (grams[fold] @ solved)).sum() - 2 * (solved * crosses[fold]).sum())
        choices.append(
            RidgeChoice(len(rotation[:parts]), part_penalty, feature_penalty, error / nothing if nothing else 1.0)
        )
    return min(choices, key=lambda choice: choice.error)


def _solve_time(summed: State, rotation: Tensor, features: int, choice: RidgeChoice, target: str) -> Tensor:
    turned = _row_map(rotation, features)
    gram = turned @ summed["time_features"].sum(0) @ turned.T
    cross = turned @ (summed[target] if summed[target].dim() == 2 else summed[target].sum(0))
    penalty = _penalty(choice.parts, features, choice.part_penalty, choice.feature_penalty)
    return torch.linalg.solve(gram + summed["pairs"].sum() * penalty, cross)


def _solve_across(gram: Tensor, cross: Tensor, visits: float) -> Tensor:
    return torch.linalg.solve(gram + EFFECT_PENALTY * visits * torch.eye(len(gram), dtype=torch.float64), cross)


def _metric(spread: Tensor, rotation: Tensor, deviations: Tensor) -> Tensor:
    """How much a difference in parts counts: the inverse of their covariance, shrunk to that of all latents alike.

    Without the shrinkage, directions in which latents hardly vary would decide, and there estimates are noise.
    """
    variances = 1 / (rotation / deviations).square().sum(1)
    return torch.linalg.inv(spread + torch.diag(variances.mean() / variances))


def _years_of_effects(
    summed: State, rotation: Tensor, metric: Tensor, typical: Tensor, numeric: Sequence[bool]
) -> Tensor:
    """τ of each feature: the years by which the typical change explains its effect, where it explains most of it.

    A category acts like years, as many at every age, if `τ · typical` explains more than `YEARS_EXPLAIN` of what the
    category's own effect explains in patients who were held back, and if they are no more than `MOST_YEARS`. The years
    then move each patient as the patient's own scan predicts.
    """
    columns, visits = feature_columns(numeric), float(summed["visits"][0])
    reading = metric @ typical / (typical @ metric @ typical)
    years = torch.zeros(len(columns), dtype=torch.float64)
    grams, crosses = summed["across_features"], summed["across_parts"] @ rotation.T
    every = list(range(len(columns)))

    def solved(rows: list[int], folds: list[int]) -> Tensor:
        model = torch.zeros(len(columns), len(typical), dtype=torch.float64)
        gram, cross = grams[folds].sum(0)[rows][:, rows], crosses[folds].sum(0)[rows]
        model[rows] = _solve_across(gram, cross, visits)
        return model

    for category in [column for column, number in enumerate(numeric) if not number]:
        group = [row for row in every if category in columns[row]]
        alone = [row for row in every if row not in group or columns[row] == (category,)]
        own = explained = by_years = 0.0
        for fold, others in held_back_folds():

            def error(model: Tensor, fold: int = fold) -> float:
                return float(((model.T @ grams[fold] @ model - 2 * model.T @ crosses[fold]) * metric).sum())

            free, bound = solved(every, others), solved(alone, others)
            without = free.clone()
            without[group] = 0.0
            bound[group] = torch.outer(bound[group] @ reading, typical)
            own, by_years = own + error(free), by_years + error(bound)
            explained += error(without) - error(free)
        found = solved(alone, list(range(len(grams))))[group] @ reading
        fits = explained > 0 and by_years - own < (1 - YEARS_EXPLAIN) * explained
        if fits and float(found[0].abs()) <= MOST_YEARS:
            years[group] = found
    return years


def _change_spread(summed: State, rotation: Tensor, part_yearly: Tensor, features: int) -> Tensor:
    turned = _row_map(rotation, features)
    gram = turned @ summed["time_features"].sum(0) @ turned.T
    cross = part_yearly.T @ turned @ summed["time_parts"].sum(0) @ rotation.T
    moved = rotation @ summed["time_spread"] @ rotation.T
    rest = moved - cross - cross.T + part_yearly.T @ gram @ part_yearly
    return rest / summed["pairs"].sum()


def _moments(means: Tensor) -> Tensor:
    """Mean and standard deviation from the means of values and of squares."""
    return torch.stack([means[0], (means[1] - means[0].square()).clamp_min(0).sqrt()])
