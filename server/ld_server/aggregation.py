"""Aggregators: from the sites' adapters to one, as pure functions with the same result in any order of arrival."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ld_common.adapters.low_rank import sum_of_products
from ld_common.adapters.state_dict import BLOCK, GROUP_BYTES, checked_update_norm
from ld_common.core.config import checked, require, to_mapping
from ld_common.core.errors import AdapterError
from ld_common.core.registry import Registry
from ld_common.core.state import State, Tensors, grouped_names, part_of
from ld_common.protocol.messages import TrainNumbers, TrainResult
from ld_common.protocol.study_config import FederationConfig, StudyConfig
from ld_server.drift_form import DriftForm
from ld_server.stored_states import FlatReference, ScaledState

DRIFT = "drift"


@dataclass(frozen=True)
class Aggregate:
    """What a round leaves for the next one; part of a checkpoint."""

    state: State
    """The adapter's trainable part, from which sites start."""
    carried: State = field(default_factory=dict)
    """Factors, named as a LoRA's, whose products sites add to the base's weights; empty for most aggregators."""
    memory: State = field(default_factory=dict)
    """What the aggregator itself keeps from round to round, such as momentum."""

    def released(self, adapter: State) -> State:
        """All of the adapter with what is carried, of a rank that holds both.

        Args:
            adapter: its tensors with this state, frozen ones among them.
        """
        return sum_of_products([adapter, self.carried], [1.0, 1.0]) if self.carried else adapter


class Aggregator(ABC):
    """A way to combine the sites' tensors. Subclasses are dataclasses whose fields are the options of a study's
    `federation.aggregation` section.

    One that combines each tensor by itself averages a LoRA's factors A and B apart, and mean(B)·mean(A) is not the mean
    of the products B·A (nor is it with medians): see `ld_server.lora_aggregation` for those that are exact.
    """

    name: ClassVar[str]
    """Name in configs and in `AGGREGATORS`."""
    weighted: ClassVar[bool] = True
    """Whether it uses the sites' weights; one that does not needs `federation.weighting: equal`."""
    min_sites: ClassVar[int] = 1
    """Fewest sites whose aggregate means what the name says."""
    only_mean: ClassVar[bool] = False
    """Whether the mean of the states is all that it uses: it can be summed as replies come, and secretly. It is then a
    `Mean` with a `step`."""
    factors: ClassVar[str] = ""
    """Of a LoRA it needs: `both` factors trained, `b` alone or in turn (`alternate`); empty for any adapter."""
    mixed_ranks: ClassVar[bool] = False
    """Whether sites may have LoRAs of different ranks (`federation.ranks`)."""

    def combine(
        self, states: Sequence[Tensors], weights: Sequence[float], before: Aggregate, round_number: int
    ) -> Aggregate:
        """The next round's start from what the sites sent.

        Args:
            states: as `aggregate`'s.
            weights: as `aggregate`'s.
            before: what the round started from; it has the names of the states.
            round_number: from 1.
        """
        return replace(before, state=self.aggregate(states, weights))

    @abstractmethod
    def aggregate(self, states: Sequence[Tensors], weights: Sequence[float]) -> State:
        """The sites' states as one.

        Args:
            states: one a site, in the order of the sites' names, with the same names and shapes. They lie in files:
                `ld_common.core.state.part_of` reads several tensors of one at once.
            weights: one a site, above 0.

        Returns:
            Float32 tensors of the same names and shapes.
        """


@dataclass
class Mean(Aggregator):
    """The weighted mean (FedAvg, arXiv 1602.05629), summed in float64.

    With `federation.weighting: equal` the adapter's is summed as replies come, in integers (`ld_server.running_mean`).
    """

    name: ClassVar[str] = "mean"
    only_mean: ClassVar[bool] = True

    def combine(
        self, states: Sequence[Tensors], weights: Sequence[float], before: Aggregate, round_number: int
    ) -> Aggregate:
        """`step` from the mean."""
        return self.step(self.aggregate(states, weights), before, round_number)

    def step(self, mean: State, before: Aggregate, round_number: int) -> Aggregate:
        """The next round's start from the mean of what the sites sent: the mean itself."""
        return replace(before, state=mean)

    def aggregate(self, states: Sequence[Tensors], weights: Sequence[float]) -> State:
        """Average each tensor by weight; the float64 sum runs in the order of the states."""
        total = sum(weights)
        mean: State = {}
        for names in grouped_names(states[0], GROUP_BYTES):
            sums: dict[str, Tensor] = {}
            for state, weight in zip(states, weights, strict=True):
                for name, value in part_of(state, names).items():
                    if name not in sums:
                        sums[name] = torch.zeros(value.shape, dtype=torch.float64)
                    _add(sums[name].view(-1).numpy(), value.detach().reshape(-1).numpy(), weight / total)
            mean |= {name: sums[name].float() for name in names}
        return mean


@dataclass
class TrimmedMean(Aggregator):
    """The mean without the highest and the lowest sites, number by number (arXiv 1803.01498).

    A minority of lying sites, at most the share `beta`, cannot move a number beyond the range of the honest ones.
    """

    name: ClassVar[str] = "trimmed_mean"
    weighted: ClassVar[bool] = False
    min_sites: ClassVar[int] = 3

    beta: float = 0.2
    """Share of the round's sites trimmed at each end, rounded up; at least two sites remain, of an odd number one."""

    def __post_init__(self) -> None:
        require(0 < self.beta < 0.5, f"federation.aggregation.beta is {self.beta:g}: use a share below 0.5")

    def trimmed(self, sites: int) -> int:
        """How many sites are left out at each end."""
        return min((sites - 1) // 2, math.ceil(self.beta * sites - 1e-9))  # 0.1 * 30 is a little above 3

    def aggregate(self, states: Sequence[Tensors], weights: Sequence[float]) -> State:
        """Aggregate number by number; `weights` is ignored, so that no site gains by claiming more scans."""
        return _trimmed_states(states, self.trimmed(len(states)))


@dataclass
class Median(Aggregator):
    """The median, number by number (arXiv 1803.01498); of an even number of sites the mean of the middle two."""

    name: ClassVar[str] = "median"
    weighted: ClassVar[bool] = False
    min_sites: ClassVar[int] = 3

    def aggregate(self, states: Sequence[Tensors], weights: Sequence[float]) -> State:
        """Aggregate number by number; `weights` is ignored, so that no site gains by claiming more scans."""
        return _trimmed_states(states, (len(states) - 1) // 2)


AGGREGATORS: Registry[type[Aggregator]] = Registry(
    "aggregator",
    "latent_drift.aggregators",
    {
        "mean": "ld_server.aggregation:Mean",
        "median": "ld_server.aggregation:Median",
        "trimmed_mean": "ld_server.aggregation:TrimmedMean",
        "fedavgm": "ld_server.server_optimizers:FedAvgM",
        "fedadam": "ld_server.server_optimizers:FedAdam",
        "fedyogi": "ld_server.server_optimizers:FedYogi",
        "ffa": "ld_server.lora_aggregation:Ffa",
        "rolora": "ld_server.lora_aggregation:RoLora",
        "flexlora": "ld_server.lora_aggregation:FlexLora",
        "fedex": "ld_server.lora_aggregation:FedEx",
        "flora": "ld_server.lora_aggregation:Flora",
        "fedsa": "ld_server.lora_aggregation:FedSa",
    },
)
"""A new one is a subclass of `Aggregator` and a line here, or an entry point of another package."""


def uses_only_mean(aggregator: Aggregator) -> bool:
    """Whether our sum can take the place of `aggregate`: not where a subclass has a mean of its own."""
    return aggregator.only_mean and isinstance(aggregator, Mean) and type(aggregator).aggregate is Mean.aggregate


def read_aggregator(federation: FederationConfig) -> Aggregator:
    """The aggregator of a study, checked against the rest of its federation section.

    Raises:
        ConfigError: no such aggregator, an unknown option, or a federation that it does not fit.
    """
    options = federation.aggregation
    name = str(options.get("name", "mean"))
    schema = AGGREGATORS.load(name)
    given = {key: value for key, value in options.items() if key != "name"}
    aggregator = checked(schema, given, "federation.aggregation.")
    where = f"federation.aggregation {name}"
    equal = schema.weighted or federation.weighting == "equal"
    require(equal, f"{where} counts every site the same: set federation.weighting to equal")
    enough = federation.min_train_nodes >= schema.min_sites
    require(enough, f"{where} needs {schema.min_sites} sites a round: raise federation.min_train_nodes")
    if federation.secure_aggregation:
        require(
            uses_only_mean(aggregator),
            f"{where} needs each site's tensors, and federation.secure_aggregation shows the server only their sum: "
            "use mean, fedavgm, fedadam, fedyogi, ffa, rolora or fedsa",
        )
    if federation.ranks:
        require(aggregator.mixed_ranks, f"{where} cannot combine federation.ranks: use flexlora or flora")
    return aggregator


def check_aggregation(study: StudyConfig) -> Aggregator:
    """The aggregator of a study, checked against its adapter, privacy and secure aggregation as well.

    Raises:
        ConfigError: as `read_aggregator`, or a pair that cannot work, with the reason.
    """
    aggregator, adapter = read_aggregator(study.federation), study.adapter
    where = f"federation.aggregation {aggregator.name}"
    if aggregator.factors:
        require(adapter["name"] == "lora", f"{where} is of LoRA's factors, and adapter.name is {adapter['name']}")
        scaled = [name for name in ("use_rslora", "use_dora") if adapter[name]]
        require(not scaled, f"{where} works with B A alone: set adapter.{', adapter.'.join(scaled)} to false")
        alike = aggregator.only_mean or not adapter["rank_pattern"]
        require(alike, f"{where} gives all layers one rank: leave out adapter.rank_pattern")
        frozen = bool(adapter["freeze_a"])
        if aggregator.factors == "b":
            require(frozen, f"{where} trains B alone: leave out adapter.freeze_a, or set it to true")
        else:
            private = " (the default under differential privacy)" if study.privacy.enabled else ""
            require(not frozen, f"{where} trains both factors: set adapter.freeze_a{private} to false, or use ffa")
    return aggregator


def complete_aggregation(federation: FederationConfig) -> dict[str, Any]:
    """A study's `federation.aggregation` section with every option filled in; raises `ConfigError`."""
    aggregator = read_aggregator(federation)
    return {"name": aggregator.name, **to_mapping(aggregator)}


def site_weights(visits: Mapping[str, int | None], federation: FederationConfig) -> dict[str, float]:
    """Weight of each site in the average of a round.

    Args:
        visits: what each site reports, which nobody can check; None where it withholds it.
        federation: the study's; its `max_weight_ratio` times the median bounds a weight.
    """
    if federation.weighting == "equal" or None in visits.values():
        return dict.fromkeys(visits, 1.0)
    counts = {name: float(count or 0) for name, count in visits.items()}
    largest = federation.max_weight_ratio * statistics.median(counts.values())
    return {name: min(count, largest) for name, count in counts.items()}


def combine_states(
    states: Mapping[str, Tensors],
    weights: Mapping[str, float],
    aggregator: Aggregator,
    before: Aggregate,
    round_number: int,
) -> Aggregate:
    """The next round's start from the sites' states, by name."""
    names = sorted(states)
    return aggregator.combine([states[name] for name in names], [weights[name] for name in names], before, round_number)


def aggregate_states(states: Mapping[str, Tensors], weights: Mapping[str, float], aggregator: Aggregator) -> State:
    """The sites' states, by name, as one."""
    names = sorted(states)
    return aggregator.aggregate([states[name] for name in names], [weights[name] for name in names])


def aggregate_drifts(
    drifts: Mapping[str, Tensor], weights: Mapping[str, float], aggregator: Aggregator
) -> Tensor | None:
    """The sites' drifts as one, by the same aggregator; None without drifts."""
    if not drifts:
        return None
    return aggregate_states({name: {DRIFT: drift} for name, drift in drifts.items()}, weights, aggregator)[DRIFT]


def _trimmed_states(states: Sequence[Tensors], cut: int) -> State:
    trimmed: State = {}
    for names in grouped_names(states[0], GROUP_BYTES // len(states)):
        parts = [part_of(state, names) for state in states]
        trimmed |= {name: _trimmed_mean([part[name] for part in parts], cut) for name in names}
    return trimmed


def _add(sums: np.ndarray, numbers: np.ndarray, weight: float) -> None:
    """Add float32 numbers times a weight to float64 sums, block by block in the processor's cache."""
    for start in range(0, numbers.size, BLOCK):
        block = slice(start, start + BLOCK)
        sums[block] += np.multiply(numbers[block], weight, dtype=np.float64)


def _trimmed_mean(values: Sequence[Tensor], cut: int) -> Tensor:
    """The elementwise mean without the `cut` highest and lowest values; with all but one or two cut, the median."""
    ordered = torch.stack(list(values)).sort(dim=0).values
    return ordered[cut : len(values) - cut].double().mean(0).float()


def check_result(
    result: TrainResult,
    reference: State,
    form: DriftForm | None,
    max_norm: float,
    flat: FlatReference | None = None,
) -> float:
    """Check a result before it is aggregated; returns the L2 norm of its update.

    Args:
        result: a site's.
        reference: the adapter that the site received.
        form: of the round's drift; None for no drift.
        max_norm: largest accepted L2 norm of `result.state - reference`.
        flat: of the reference, for a faster check.

    Raises:
        AdapterError: wrong keys, shapes, dtype, drift or counts, a value that is not finite, or too large a norm.
    """
    norm = None if flat is None else flat.update_norm(result.state)
    if norm is None or not math.isfinite(norm):
        norm = checked_update_norm(result.state, reference)
    if norm > max_norm:
        raise AdapterError(f"its update has norm {norm:.3g}, more than federation.max_update_norm {max_norm:g}")
    if form is not None:
        form.check(result.drift)
    elif result.drift is not None:
        raise AdapterError("it sends a drift, and the study has none")
    if result.numbers is not None:
        _check_numbers(result.numbers)
    return norm


def _check_numbers(numbers: TrainNumbers) -> None:
    if not all(map(math.isfinite, (numbers.loss_first, numbers.loss_last, numbers.seconds, *numbers.coverage))):
        raise AdapterError("its losses or coverage hold NaN or infinite values")
    if numbers.visits < 1 or not 1 <= numbers.patients <= numbers.visits:
        raise AdapterError(f"it counts {numbers.visits} visits of {numbers.patients} patients")


def clip_update(state: Tensors, reference: State, limit: float, norm: float) -> Tensors:
    """The state with its update, of L2 norm `norm`, scaled down to `limit` where it is above; 0 is no limit."""
    return state if limit == 0 or norm <= limit else ScaledState(state, reference, limit / norm)
