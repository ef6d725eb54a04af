"""A release without Flower: the same sites, rounds, averages and draws, in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ld_client.data.store import open_store
from ld_client.site_config import load_site
from ld_client.site_drift import site_drift
from ld_client.train import train_round
from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.low_rank import rank_of, sum_of_products
from ld_common.adapters.registry import read_adapter
from ld_common.core.errors import ConfigError
from ld_common.core.state import State
from ld_common.diffusion.base_model import base_digest, load_denoiser
from ld_common.diffusion.drift import LatentDrift, entering
from ld_common.diffusion.training import TrainingData
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import ReleaseContent, write_release
from ld_server.aggregation import (
    Aggregate,
    aggregate_drifts,
    check_aggregation,
    combine_states,
    read_aggregator,
    site_weights,
)
from ld_server.lora_aggregation import mean_own_part
from ld_simulations.demo import Demo


def train_release(demo: Demo, folder: Path, progress: Callable[[], None] = lambda: None) -> Path:
    """Train a demo's study on its prepared sites and write the release to `folder`.

    Args:
        demo: its sites are prepared.
        folder: of the release.
        progress: called after each site's round.

    Raises:
        ConfigError: the study is private, sums securely or preserves a prior, which this loop does not do.
    """
    study, modality = demo.study, demo.modality
    adapter = read_adapter(study.adapter)
    if study.withholds_numbers or adapter.prior is not None:
        raise ConfigError("only plain studies are trained in one process: run this one through ld-simulate")
    model = load_denoiser(study.base_model)
    data: dict[str, TrainingData] = {}
    drifts: dict[str, Tensor] = {}
    for name in study.federation.sites:
        site = load_site(demo.sites / f"{name}.yaml")
        store = open_store(site.store_path)
        drift = site_drift(site, modality, store, model, study)
        if drift is not None:
            drifts[name] = drift
        entered = None if drift is None else entering(drift, study.drift.formulation)
        data[name] = TrainingData(
            store.latents,
            store.prompts,
            entered if isinstance(entered, LatentDrift) else None,
            patients=store.pseudonyms,
            condition_vectors=store.condition_vectors(modality),
        )
    adapted = inject(model, adapter, study.seed)
    trained = train_in_rounds(adapted, data, study, progress)
    aggregator = read_aggregator(study.federation)
    weights = site_weights({name: len(site_data.latents) for name, site_data in data.items()}, study.federation)
    mean = aggregate_drifts(drifts, weights, aggregator)
    form = study.drift.formulation
    state = trained.aggregate.released(adapted.state())
    content = ReleaseContent(
        base_digest(study.base_model),
        state,
        None if mean is None else entering(mean, form),
        {name: entering(drift, form) for name, drift in drifts.items()},
        adapter={**study.adapter, "rank": rank_of(state)} if trained.aggregate.carried else None,
        own_parts=trained.own_parts,
    )
    return write_release(folder, study, modality, content)


@dataclass(frozen=True)
class TrainedRounds:
    """What rounds leave."""

    aggregate: Aggregate
    own_parts: dict[str, State]
    """Factors that the study leaves at the sites, by site."""


def train_in_rounds(
    adapted: AdaptedModel[Any],
    data: Mapping[str, TrainingData],
    study: StudyConfig,
    progress: Callable[[], None] = lambda: None,
) -> TrainedRounds:
    """Train an adapter in place: every site from the same weights in each round, then what the aggregator makes of it.

    Sites that keep factors of their own start from them; at the end the adapter has their mean.

    Args:
        adapted: the base with the adapter; what the aggregator carries is added to the base's weights.
        data: of each site, all of the study's own rank.
        study: its rounds, options and aggregation.
        progress: called after each site's round.

    Raises:
        ConfigError: the aggregator does not fit the study.
    """
    aggregator = check_aggregation(study)
    weights = site_weights({name: len(site_data.latents) for name, site_data in data.items()}, study.federation)
    last, trainable = Aggregate(adapted.trainable_state()), dict(adapted.trainable)
    own: dict[str, State] = {}
    for number in range(1, study.federation.rounds + 1):
        updates = {}
        for name, parameter in trainable.items():
            parameter.requires_grad_(study.trains(name, number))
        for name, site_data in data.items():
            adapted.load({**last.state, **own.get(name, {})})
            train_round(adapted, site_data, study, number, name)
            trained = adapted.trainable_state()
            updates[name] = {key: value for key, value in trained.items() if study.sends(key, number)}
            own[name] = {key: value for key, value in trained.items() if study.keeps(key)}
            progress()
        before = replace(last, state={key: value for key, value in last.state.items() if study.sends(key, number)})
        after = combine_states(updates, weights, aggregator, before, number)
        if after.carried:
            earlier = [last.carried] if last.carried else []
            change = sum_of_products([after.carried, *earlier], [1.0, *(-1.0 for _ in earlier)])
            adapted.adapter.add_to_base(adapted.model, change)
        last = replace(after, state={**last.state, **after.state})
    for parameter in trainable.values():
        parameter.requires_grad_(True)
    own = {name: part for name, part in own.items() if part}
    adapted.load({**last.state, **mean_own_part(own)})
    return TrainedRounds(last, own)
