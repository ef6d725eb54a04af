"""Files of a run besides checkpoint and release: a log with one line a round, a lock, the reason of a failure."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ld_common.core.atomic_files import held, write_bytes
from ld_common.core.errors import CheckpointError, FederationError

RELEASE, ROUNDS, FAILURE, LOCK = "release", "rounds.jsonl", "failure.txt", "run.lock"


@dataclass
class RoundRecord:
    """What happened in one round; part of checkpoint, release and report."""

    round: int
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Site -> why its result did not count."""
    unknown_nodes: list[str] = field(default_factory=list)
    """Fingerprints of the keys of connected nodes that belong to no admitted site; they were sent nothing."""
    counted: bool = False
    """Whether enough results were valid for the round to change the adapter."""
    failure: str = ""
    """Why the round did not count, for a reason that is not one site's."""
    mean_update_norm: float | None = None
    """L2 norm of the sites' mean update, under secure aggregation."""
    validation: dict[str, dict[str, float]] = field(default_factory=dict)
    """Site -> what the adapter after the round scores on its held-out patients (`messages.ValidationResult`)."""
    validation_mean: dict[str, float] = field(default_factory=dict)
    """The same, weighted by the sites' held-out visits."""
    not_validated: dict[str, str] = field(default_factory=dict)
    """Site -> why it has no such scores."""
    ended: str = ""
    """ISO 8601, UTC."""
    seconds: float = 0.0


def write_rounds(folder: Path, records: Sequence[RoundRecord]) -> None:
    """Replace the folder's log; raises `CheckpointError`."""
    write_bytes(folder / ROUNDS, "".join(_line(record) for record in records).encode())


def append_round(folder: Path, record: RoundRecord) -> None:
    """Add a round; raises `CheckpointError`."""
    try:
        with (folder / ROUNDS).open("a") as stream:
            stream.write(_line(record))
    except OSError as error:
        raise CheckpointError(f"cannot write '{folder / ROUNDS}' ({error.strerror}): free some space") from error


def read_rounds(folder: Path) -> list[RoundRecord]:
    """The rounds of the folder's run; an unfinished last line of a killed run is ignored.

    Raises:
        CheckpointError: another line cannot be read.
    """
    path = folder / ROUNDS
    try:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [RoundRecord(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"cannot read '{path}' ({error}): resume the run, which writes the file again") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder, until the process ends at the latest; raises `FederationError` if another run holds it."""
    refusal = FederationError(f"another run uses '{folder}': end it first, or wait for it")
    with held(folder / LOCK, refusal):
        yield


def is_locked(folder: Path) -> bool:
    """Whether a run holds the folder."""
    try:
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _line(record: RoundRecord) -> str:
    return json.dumps(vars(record)) + "\n"
