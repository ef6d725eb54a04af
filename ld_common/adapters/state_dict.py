"""Named tensors in safetensors files, and the checks of states that others send."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import AdapterError
from ld_common.core.state import State, Tensors, grouped_names, part_of

TRANSFORMER = "transformer."
BLOCK = 2**15
"""Numbers that are compared at once."""
GROUP_BYTES = 2**26
"""Of tensors that are read from a file at once."""


def diffusers_prefix(state: Tensors) -> str:
    """What diffusers puts before the names of a network's tensors; ours begin with `unet.` for every network."""
    blocks = ("unet.transformer_blocks.", "unet.single_transformer_blocks.")
    return TRANSFORMER if any(name.startswith(blocks) for name in state) else "unet."


def write_tensors(path: Path, state: State, metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically; raises `CheckpointError`, and then an earlier file is intact."""
    write_bytes(path, save(state, metadata))


def read_tensors(path: Path) -> tuple[State, dict[str, str]]:
    """Tensors, sorted by name, and metadata of a safetensors file; raises `AdapterError`."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in sorted(file.keys())}
            return state, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"cannot read tensors from '{path}': {error}") from error


def check_state(state: Tensors, expected: Tensors) -> None:
    """Check that a state has one finite float32 tensor for each expected name and shape.

    Raises:
        AdapterError: with the first name, shape, dtype or value that differs.
    """
    _check_names(state, expected)
    for name, value in state.items():
        _check_form(name, value, expected[name])
        if not _finite(value):
            raise AdapterError(f"tensor '{name}' holds NaN or infinite values")


def checked_update_norm(state: Tensors, reference: State) -> float:
    """`update_norm` of a state that `check_state` accepts; each tensor is read once.

    Raises:
        AdapterError: as `check_state`.
    """
    _check_names(state, reference)
    squares = 0.0
    for names in grouped_names(reference, GROUP_BYTES):
        for name, value in part_of(state, names).items():
            _check_form(name, value, reference[name])
            square = _distance(value, reference[name])
            if not math.isfinite(square):  # squares of float32 numbers do not leave the range of float64
                raise AdapterError(f"tensor '{name}' holds NaN or infinite values")
            squares += square
    return math.sqrt(squares)


def update_norm(state: Tensors, reference: State) -> float:
    """L2 norm of `state - reference` over all tensors, in float64."""
    return math.sqrt(sum(_distance(state[name], reference[name]) for name in sorted(state)))


def _check_names(state: Tensors, expected: Tensors) -> None:
    missing, extra = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing:
        raise AdapterError(f"{len(missing)} tensors are missing, the first is '{missing[0]}'")
    if extra:
        raise AdapterError(f"{len(extra)} tensors are unknown, the first is '{extra[0]}'")


def _check_form(name: str, value: Tensor, expected: Tensor) -> None:
    if value.shape != expected.shape:
        raise AdapterError(f"tensor '{name}' has shape {tuple(value.shape)}, not {tuple(expected.shape)}")
    if value.dtype != torch.float32:
        raise AdapterError(f"tensor '{name}' is {value.dtype}, not float32")


def _finite(value: Tensor) -> bool:
    return value.numel() == 0 or bool(torch.stack(value.aminmax()).isfinite().all())  # NaN comes through


def squared_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Sum of the squared differences of two vectors in float64, block by block in the processor's cache."""
    total = 0.0
    for start in range(0, first.size, BLOCK):
        block = slice(start, start + BLOCK)
        with np.errstate(invalid="ignore"):
            difference = np.subtract(first[block], second[block], dtype=np.float64)
        total += float(np.square(difference, out=difference).sum())  # BLAS would wake its threads for each block
    return total


def _distance(first: Tensor, second: Tensor) -> float:
    return squared_distance(first.detach().reshape(-1).numpy(), second.detach().reshape(-1).numpy())


def state_digest(state: State) -> str:
    """SHA-256 of names, shapes and values, in hex; the same in any order."""
    return hashlib.sha256(save({name: state[name].contiguous() for name in sorted(state)})).hexdigest()
