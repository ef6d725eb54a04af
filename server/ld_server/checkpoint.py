"""Checkpoints: the study's state after a round, written atomically.

checkpoint.safetensors           after the last round
checkpoint.previous.safetensors  after the round before, used when the newest cannot be read
best.safetensors                 after the round of the lowest validation loss, where the study releases that one
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ld_common.adapters.state_dict import read_tensors
from ld_common.core.errors import AdapterError, CheckpointError
from ld_common.core.state import State
from ld_server.drift_collection import CollectedDrifts

NAME, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"
_NEXT = "checkpoint.next.safetensors"
"""The newest, after it is written and before it is renamed."""
_NEWEST_FIRST = (NAME, _NEXT, PREVIOUS)
_BEST = "best.safetensors"
_STATE, _FROZEN, _DRIFT, _MEAN_DRIFT, _BASIS = "state/", "frozen/", "drift/", "mean-drift", "basis/"
_CARRIED, _MEMORY, _OWN = "carried/", "memory/", "own/"


@dataclass(frozen=True)
class Checkpoint:
    """The state that a study needs to continue after `round` rounds."""

    study_digest: str
    base_digest: str
    modality_digest: str
    round: int
    state: State
    """The trained tensors."""
    records: list[dict[str, Any]]
    """One a round."""
    drifts: CollectedDrifts = field(default_factory=CollectedDrifts)
    frozen: State = field(default_factory=dict)
    """The adapter's frozen part, where the study's start gave it."""
    carried: State = field(default_factory=dict)
    """Factors that sites add to the base's weights."""
    memory: State = field(default_factory=dict)
    """What the aggregator keeps from round to round."""
    own_parts: dict[str, State] = field(default_factory=dict)
    """Of a study that leaves factors at the sites, those of the sites that let them be released."""


@dataclass(frozen=True)
class NewestCheckpoint:
    """The newest intact checkpoint of a folder."""

    checkpoint: Checkpoint
    damage: str = ""
    """What is wrong with a newer one."""


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write the folder's checkpoint and keep the one before; after a `CheckpointError` the last one is intact.

    A checkpoint of the round that the newest one is of replaces it: the one before stays.
    """
    _write_content(folder / _NEXT, checkpoint)
    try:
        if (folder / NAME).exists() and _round_of(folder / NAME) != checkpoint.round:
            (folder / NAME).replace(folder / PREVIOUS)
        return (folder / _NEXT).replace(folder / NAME)
    except OSError as error:
        raise CheckpointError(
            f"cannot replace '{folder / NAME}' ({error.strerror}): make '{folder}' writable"
        ) from error


def write_best(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint of the best round so far; after a `CheckpointError` the last one is intact."""
    _write_content(folder / _BEST, checkpoint)


def read_best(folder: Path) -> Checkpoint:
    """The checkpoint of the best round; raises `CheckpointError` where there is none."""
    return _read(folder / _BEST)


def _round_of(path: Path) -> int | None:
    """The round of a checkpoint, from its head; None where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return int(json.loads((file.metadata() or {})["content"])["round"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _write_content(path: Path, checkpoint: Checkpoint) -> None:
    tensors = {_STATE + name: value for name, value in checkpoint.state.items()}
    tensors |= {_FROZEN + name: value for name, value in checkpoint.frozen.items()}
    tensors |= {_DRIFT + name: value for name, value in checkpoint.drifts.sites.items()}
    tensors |= {_BASIS + name: value for name, value in checkpoint.drifts.basis.items()}
    tensors |= {_CARRIED + name: value for name, value in checkpoint.carried.items()}
    tensors |= {_MEMORY + name: value for name, value in checkpoint.memory.items()}
    tensors |= {
        f"{_OWN}{site}/{name}": value for site, own in checkpoint.own_parts.items() for name, value in own.items()
    }
    if checkpoint.drifts.mean is not None:
        tensors[_MEAN_DRIFT] = checkpoint.drifts.mean
    words = json.dumps(
        {
            "study": checkpoint.study_digest,
            "base": checkpoint.base_digest,
            "modality": checkpoint.modality_digest,
            "round": checkpoint.round,
            "weights": checkpoint.drifts.weights,
            "records": checkpoint.records,
        }
    )
    _write(path, tensors, {"content": words, "sha256": _digest(tensors, words)})


def _write(path: Path, tensors: State, metadata: dict[str, str]) -> None:
    """Write a safetensors file in one step, without a copy of the tensors in memory; raises `CheckpointError`."""
    partial = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write '{path}' ({error}): check permissions and free space; the old file is intact"
        ) from error


def has_checkpoint(folder: Path) -> bool:
    """Whether the folder holds a checkpoint, intact or not."""
    return any((folder / name).exists() for name in _NEWEST_FIRST)


def find_checkpoint(folder: Path) -> NewestCheckpoint | None:
    """The newest intact checkpoint, or None where there is none.

    Raises:
        CheckpointError: there are checkpoints, but none can be read.
    """
    damage: list[str] = []
    for name in _NEWEST_FIRST:
        if (folder / name).exists():
            try:
                return NewestCheckpoint(_read(folder / name), "; ".join(damage))
            except CheckpointError as error:
                damage.append(str(error))
    if not damage:
        return None
    raise CheckpointError(f"{'; '.join(damage)}: restore it from a backup, or move '{folder}' away to start again")


def read_checkpoint(folder: Path) -> Checkpoint:
    """The folder's newest intact checkpoint; raises `CheckpointError` when there is none."""
    newest = find_checkpoint(folder)
    if newest is None:
        raise CheckpointError(f"'{folder}' holds no checkpoint: no round has ended there")
    return newest.checkpoint


def drop_checkpoint(folder: Path, names: Sequence[str] = (*_NEWEST_FIRST, _BEST)) -> None:
    """Delete a folder's checkpoints, or those of these names."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _read(path: Path) -> Checkpoint:
    try:
        tensors, metadata = read_tensors(path)
        words = metadata["content"]
        if _digest(tensors, words) != metadata["sha256"]:
            raise CheckpointError(f"'{path}' is damaged: its content does not have its hash")
        content = json.loads(words)
        return Checkpoint(
            study_digest=content["study"],
            base_digest=content["base"],
            modality_digest=content["modality"],
            round=content["round"],
            state=_under(_STATE, tensors),
            records=content["records"],
            drifts=CollectedDrifts(
                _under(_DRIFT, tensors), content["weights"], tensors.get(_MEAN_DRIFT), _under(_BASIS, tensors)
            ),
            frozen=_under(_FROZEN, tensors),
            carried=_under(_CARRIED, tensors),
            memory=_under(_MEMORY, tensors),
            own_parts=_by_site(_under(_OWN, tensors)),
        )
    except (AdapterError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot read the checkpoint '{path}': {error}") from error


def _under(prefix: str, tensors: State) -> State:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _by_site(tensors: State) -> dict[str, State]:
    """Tensors named `<site>/<name>`; no site's name has a slash."""
    parts: dict[str, State] = {}
    for name, value in tensors.items():
        site, _, rest = name.partition("/")
        parts.setdefault(site, {})[rest] = value
    return parts


def _digest(tensors: State, words: str) -> str:
    """SHA-256 over names, shapes, types and bytes of all tensors, and the words."""
    whole = hashlib.sha256(words.encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        whole.update(json.dumps([name, list(value.shape), str(value.dtype)]).encode())
        whole.update(value.numpy().tobytes())
    return whole.hexdigest()
