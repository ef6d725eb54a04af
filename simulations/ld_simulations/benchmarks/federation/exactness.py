"""How far the aggregators that are exact for LoRA are from the dense mean of the products, in float64."""

from __future__ import annotations

import torch

from ld_common.adapters.low_rank import dense_update
from ld_common.core.seeding import torch_generator
from ld_common.core.state import State
from ld_common.protocol.study_config import FederationConfig
from ld_server.aggregation import Aggregate, combine_states, read_aggregator

SITES, RANK, OUT, INTO = 5, 8, 320, 256
DOWN, UP = "unet.layer.lora_A.weight", "unet.layer.lora_B.weight"
EXACT = ("ffa", "flexlora", "fedex", "flora")


def exact_aggregation_error() -> dict[str, float]:
    """Relative L2 error of the mean product of five sites of unequal weight, by aggregator; flexlora at full rank."""
    weights = {f"s{number}": float(1 + number) for number in range(SITES)}
    return {name: _error(name, weights) for name in EXACT}


def _error(name: str, weights: dict[str, float]) -> float:
    shared = _factor(name, "start", RANK * (SITES if name == "flexlora" else 1))
    states = {site: _factor(name, site, RANK) for site in weights}
    if name == "ffa":
        states = {site: {DOWN: shared[DOWN], UP: state[UP]} for site, state in states.items()}
    total = sum(weights.values())
    expected = sum(
        (weights[site] / total * dense_update(state, DOWN) for site, state in states.items()), torch.zeros(1).double()
    )
    sent = {site: {UP: state[UP]} if name == "ffa" else state for site, state in states.items()}
    start = {**shared, UP: torch.zeros_like(shared[UP])}
    rule = read_aggregator(FederationConfig(sites=list(weights), aggregation={"name": name}))
    after = combine_states(sent, weights, rule, Aggregate({UP: start[UP]} if name == "ffa" else start), 1)
    found = dense_update({**shared, **after.state}, DOWN)
    if after.carried:
        found = found + dense_update(after.carried, DOWN)
    return float((found - expected).norm() / expected.norm())


def _factor(name: str, site: str, rank: int) -> State:
    generator = torch_generator(0, "exactness", name, site)
    down, up = torch.randn(rank, INTO, generator=generator), torch.randn(OUT, rank, generator=generator)
    return {DOWN: down, UP: up}
