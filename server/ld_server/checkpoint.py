"""The study's state after a round, in one file that is either the old one or the new one, never half of either."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ld_common.adapters import read_tensors, write_tensors
from ld_common.errors import AdapterError, CheckpointError
from ld_common.schemes import State

NAME = "checkpoint.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The learned state after `round` rounds of the study with this digest, and the record of each round."""

    study_digest: str
    round: int
    state: State
    records: list[dict[str, Any]]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Replace the folder's checkpoint; raises `CheckpointError` with the last one still whole."""
    metadata = {
        "study": checkpoint.study_digest,
        "round": str(checkpoint.round),
        "records": json.dumps(checkpoint.records),
    }
    write_tensors(folder / NAME, checkpoint.state, metadata)
    return folder / NAME


def read_checkpoint(folder: Path) -> Checkpoint:
    """The folder's checkpoint; raises `CheckpointError` when there is none or it cannot be read."""
    try:
        state, metadata = read_tensors(folder / NAME)
        return Checkpoint(metadata["study"], int(metadata["round"]), state, json.loads(metadata["records"]))
    except (AdapterError, KeyError, ValueError) as error:
        raise CheckpointError(f"cannot read the checkpoint in '{folder}': {error}") from error
