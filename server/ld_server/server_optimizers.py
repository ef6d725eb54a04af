"""Adaptive federated optimisation (arXiv 2003.00295) and momentum (arXiv 1909.06335): Flower's own strategies.

The change from the round's start to the sites' mean is taken as a gradient. Each step is made by the `aggregate_train`
of Flower's strategy, which gets the mean as one reply; what it keeps from round to round is part of the checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam as FlowerFedAdam
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy import FedAvgM as FlowerFedAvgM
from flwr.serverapp.strategy import FedYogi as FlowerFedYogi

from ld_common.core.config import require
from ld_common.core.errors import FederationError
from ld_common.core.state import State
from ld_server.aggregation import Aggregate, Mean

ARRAYS, EXAMPLES = "arrays", "num-examples"
FLOWER_LOG = logging.getLogger("flwr")


def _numpy(state: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in state.items()}


def _record(state: State) -> ArrayRecord:
    return ArrayRecord(dict(state))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _MeanReply:
    """The mean as a strategy reads a reply: Flower's own message can only be made inside of a run."""

    content: RecordDict

    def has_error(self) -> bool:
        """It holds no error."""
        return False

    def has_content(self) -> bool:
        """It holds the mean."""
        return True


def _stepped(strategy: FedAvg, mean: State, round_number: int) -> State:
    """The arrays that a strategy of Flower makes of one reply."""
    content = RecordDict({ARRAYS: _record(mean), "metrics": MetricRecord({EXAMPLES: 1})})
    level = FLOWER_LOG.level
    FLOWER_LOG.setLevel(logging.WARNING)  # it would say that one reply was received
    try:
        arrays, _ = strategy.aggregate_train(round_number, [cast(Message, _MeanReply(content))])
    finally:
        FLOWER_LOG.setLevel(level)
    if arrays is None:
        raise FederationError(f"{type(strategy).__name__} of Flower made nothing of the round")
    stepped = {name: value.float() for name, value in arrays.to_torch_state_dict().items()}
    if not all(bool(value.isfinite().all()) for value in stepped.values()):
        raise FederationError("the server's step gave numbers that are not finite: lower its learning rate")
    return stepped


def _part(memory: State, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value.numpy() for name, value in memory.items() if name.startswith(prefix)}


def _kept(prefix: str, arrays: Mapping[str, Any]) -> State:
    return {prefix + name: torch.from_numpy(np.asarray(value, np.float32)) for name, value in arrays.items()}


@dataclass
class FedAvgM(Mean):
    """The mean, with momentum at the server (arXiv 1909.06335)."""

    name: ClassVar[str] = "fedavgm"

    server_learning_rate: float = 1.0
    """Share of the momentum that is added; with 1 and no momentum it is the mean."""
    server_momentum: float = 0.5
    """Share of the last step that is added to the next; 0 is off."""

    def __post_init__(self) -> None:
        require(self.server_learning_rate > 0, "federation.aggregation.server_learning_rate must be above 0")
        fits = 0 <= self.server_momentum < 1
        require(fits, f"federation.aggregation.server_momentum is {self.server_momentum:g}: use 0 or more, below 1")

    def step(self, mean: State, before: Aggregate, round_number: int) -> Aggregate:
        """Add the momentum to the round's start."""
        strategy = FlowerFedAvgM(server_learning_rate=self.server_learning_rate, server_momentum=self.server_momentum)
        strategy.current_arrays = _record(before.state)
        kept = _part(before.memory, "momentum/")
        strategy.momentum_vector = list(kept.values()) if kept else None
        state = _stepped(strategy, mean, round_number)
        momentum = strategy.momentum_vector or []
        return Aggregate(state, before.carried, _kept("momentum/", dict(zip(mean, momentum, strict=False))))


@dataclass
class _Adaptive(Mean):
    """Steps whose length follows from the variance of earlier ones, number by number."""

    strategy: ClassVar[type[FlowerFedAdam] | type[FlowerFedYogi]]

    eta: float = 0.01
    """Learning rate of the server: about the largest change of a number in a round."""
    beta_1: float = 0.9
    """Share of the earlier changes in the momentum."""
    beta_2: float = 0.99
    """Share of the earlier squares in the variance."""
    tau: float = 0.001
    """Added to the root of the variance: changes well below it are not scaled up."""

    def __post_init__(self) -> None:
        require(self.eta > 0, f"federation.aggregation.eta is {self.eta:g}: it must be above 0")
        require(self.tau > 0, f"federation.aggregation.tau is {self.tau:g}: it must be above 0")
        for name in ("beta_1", "beta_2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"federation.aggregation.{name} is {value:g}: use 0 or more, below 1")

    def step(self, mean: State, before: Aggregate, round_number: int) -> Aggregate:
        """One step of Flower's strategy."""
        strategy = self.strategy(eta=self.eta, beta_1=self.beta_1, beta_2=self.beta_2, tau=self.tau)
        strategy.current_arrays = _numpy(before.state)
        strategy.m_t = _part(before.memory, "m/") or None
        strategy.v_t = _part(before.memory, "v/") or None
        state = _stepped(strategy, mean, round_number)
        memory = _kept("m/", strategy.m_t or {}) | _kept("v/", strategy.v_t or {})
        return Aggregate(state, before.carried, memory)


@dataclass
class FedAdam(_Adaptive):
    """Adam at the server (arXiv 2003.00295)."""

    name: ClassVar[str] = "fedadam"
    strategy: ClassVar[type[FlowerFedAdam] | type[FlowerFedYogi]] = FlowerFedAdam


@dataclass
class FedYogi(_Adaptive):
    """Yogi at the server (arXiv 2003.00295): the variance grows and shrinks by additions."""

    name: ClassVar[str] = "fedyogi"
    strategy: ClassVar[type[FlowerFedAdam] | type[FlowerFedYogi]] = FlowerFedYogi
