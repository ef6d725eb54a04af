"""Named tensors in safetensors files, and the checks of states that others send."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import AdapterError
from ld_common.core.state import State


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


def check_state(state: State, expected: State) -> None:
    """Check that a state has one finite float32 tensor for each expected name and shape.

    Raises:
        AdapterError: with the first name, shape, dtype or value that differs.
    """
    missing, extra = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing:
        raise AdapterError(f"{len(missing)} tensors are missing, the first is '{missing[0]}'")
    if extra:
        raise AdapterError(f"{len(extra)} tensors are unknown, the first is '{extra[0]}'")
    for name, value in state.items():
        if value.shape != expected[name].shape:
            shapes = f"{tuple(value.shape)}, not {tuple(expected[name].shape)}"
            raise AdapterError(f"tensor '{name}' has shape {shapes}")
        if value.dtype != torch.float32:
            raise AdapterError(f"tensor '{name}' is {value.dtype}, not float32")
        if not bool(torch.isfinite(value).all()):
            raise AdapterError(f"tensor '{name}' holds NaN or infinite values")


def update_norm(state: State, reference: State) -> float:
    """L2 norm of `state - reference` over all tensors, in float64."""
    squares = [(state[name].double() - reference[name].double()).square().sum() for name in sorted(state)]
    return float(torch.stack(squares).sum().sqrt())


def state_digest(state: State) -> str:
    """SHA-256 of names, shapes and values, in hex; the same in any order."""
    return hashlib.sha256(save({name: state[name].contiguous() for name in sorted(state)})).hexdigest()
