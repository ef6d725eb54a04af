"""From the sites' answers to one adapter: pure functions, the same result in whatever order answers arrive."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ld_common.adapters.registry import State
from ld_common.adapters.state_dict import check_state, update_norm
from ld_common.core.errors import AdapterError
from ld_common.diffusion.drift import LARGEST_DRIFT, mean_drift
from ld_common.protocol.messages import TrainNumbers, TrainResult
from ld_common.protocol.study_config import FederationConfig


def check_result(result: TrainResult, reference: State, drift_shape: torch.Size | None, max_norm: float) -> float:
    """Refuse an answer that could harm the average; returns the L2 norm of its update.

    Args:
        result: a site's answer.
        reference: the adapter that the site was sent.
        drift_shape: shape that the study's drift must have, or None for no drift.
        max_norm: largest accepted L2 norm of `result.state - reference`.

    Raises:
        AdapterError: names what is wrong: keys, shapes, dtype, NaN, norm, drift, counts.
    """
    check_state(result.state, reference)
    norm = update_norm(result.state, reference)
    if norm > max_norm:
        raise AdapterError(f"its update has norm {norm:.3g}, more than federation.max_update_norm {max_norm:g}")
    shape = None if result.drift is None else result.drift.shape
    if shape != drift_shape:
        raise AdapterError(f"its drift has shape {shape and tuple(shape)}, not {drift_shape and tuple(drift_shape)}")
    if result.drift is not None and result.drift.dtype != torch.float32:
        raise AdapterError(f"its drift is {result.drift.dtype}, not float32")
    if result.drift is not None and not bool(torch.isfinite(result.drift).all()):
        raise AdapterError("its drift holds NaN or infinite values")
    if result.drift is not None and float(result.drift.abs().max()) > LARGEST_DRIFT:
        raise AdapterError(f"its drift reaches {float(result.drift.abs().max()):.3g}, more than {LARGEST_DRIFT:g}")
    if result.numbers is not None:
        _check_numbers(result.numbers)
    return norm


def _check_numbers(numbers: TrainNumbers) -> None:
    if not all(map(math.isfinite, (numbers.loss_first, numbers.loss_last, numbers.seconds, *numbers.coverage))):
        raise AdapterError("its losses or coverage hold NaN or infinite values")
    if numbers.visits < 1 or not 1 <= numbers.patients <= numbers.visits:
        raise AdapterError(f"it counts {numbers.visits} visits of {numbers.patients} patients")


def clip_update(state: State, reference: State, limit: float) -> tuple[State, bool]:
    """The state with its change scaled down to an L2 norm of `limit`, and whether it was above; 0 is no limit."""
    norm = update_norm(state, reference)
    if limit == 0 or norm <= limit:
        return state, False
    scale = limit / norm
    clipped = {
        name: (reference[name].double() + (value.double() - reference[name].double()) * scale).float()
        for name, value in state.items()
    }
    return clipped, True


def aggregate_states(states: Mapping[str, State], weights: Mapping[str, float], rule: FederationConfig) -> State:
    """The sites' states as one, by the study's rule; the same for every order of sites.

    Each tensor is taken by itself: a LoRA's factors A and B are aggregated apart, and mean(B)·mean(A) is not the mean
    of the products B·A (nor is it with medians). `scheme.freeze_a` has one A for all, and the mean is then exact.
    """
    if rule.aggregate == "mean":
        return average_states(states, weights)
    names, cut = sorted(states), trimmed_sites(len(states), rule)
    return {key: trimmed_mean([states[name][key] for name in names], cut) for key in sorted(states[names[0]])}


def aggregate_drifts(
    drifts: Mapping[str, Tensor], weights: Mapping[str, float], rule: FederationConfig
) -> Tensor | None:
    """The sites' drifts as one, by the same rule; None without drifts."""
    names = sorted(drifts)
    if rule.aggregate == "mean" or not names:
        return mean_drift([drifts[name] for name in names], [weights[name] for name in names])
    return trimmed_mean([drifts[name] for name in names], trimmed_sites(len(names), rule))


def trimmed_sites(sites: int, rule: FederationConfig) -> int:
    """How many sites are left out at each end: so many that lie cannot move a number past the honest sites' range."""
    most = (sites - 1) // 2
    if rule.aggregate == "median":
        return most
    return min(most, math.ceil(rule.trim_share * sites - 1e-9))  # 0.1 * 30 is a little above 3


def trimmed_mean(values: Sequence[Tensor], cut: int) -> Tensor:
    """The mean, number by number, without the `cut` highest and lowest; with all but one or two cut, the median."""
    ordered = torch.stack(list(values)).sort(dim=0).values
    return ordered[cut : len(values) - cut].double().mean(0).float()


def average_states(states: Mapping[str, State], weights: Mapping[str, float]) -> State:
    """The weighted mean of the sites' states, summed in float64 in the order of the sites' names."""
    names, total = sorted(states), sum(weights[name] for name in sorted(states))
    mean: State = {}
    for key in sorted(states[names[0]]):
        summed: Tensor = torch.zeros_like(states[names[0]][key], dtype=torch.float64)
        for name in names:
            summed += states[name][key].double() * (weights[name] / total)
        mean[key] = summed.float()
    return mean
