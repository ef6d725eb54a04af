"""From the sites' answers to one adapter: pure functions, the same result in whatever order answers arrive."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ld_common.adapters import check_state, update_norm
from ld_common.drift import LARGEST_DRIFT
from ld_common.errors import AdapterError
from ld_common.messages import TrainNumbers, TrainResult
from ld_common.schemes import State


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
    if not all(map(math.isfinite, (numbers.loss_first, numbers.loss_last, numbers.seconds))):
        raise AdapterError("its losses hold NaN or infinite values")
    if numbers.visits < 1 or not 1 <= numbers.patients <= numbers.visits:
        raise AdapterError(f"it counts {numbers.visits} visits of {numbers.patients} patients")


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
