"""What a run leaves in its folder beside checkpoint and release: one line a round, its lock, and why it failed."""

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
    """What happened in one round, as checkpoint, release and report keep it."""

    round: int
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Site -> why its answer did not count."""
    unknown_nodes: list[str] = field(default_factory=list)
    """Fingerprints of connected nodes' keys that are none of an admitted site; they were asked nothing."""
    counted: bool = False
    """Whether enough answers passed the checks for the round to change the adapter."""
    failure: str = ""
    """Why the round did not count, where that is no one site's doing."""
    mean_update_norm: float | None = None
    """L2 norm of the sites' mean update, where it is all that the server knows."""
    ended: str = ""
    """ISO 8601, UTC."""
    seconds: float = 0.0


def write_rounds(folder: Path, records: Sequence[RoundRecord]) -> None:
    """Replace the folder's record of the rounds by these; raises `CheckpointError`."""
    write_bytes(folder / ROUNDS, "".join(_line(record) for record in records).encode())


def append_round(folder: Path, record: RoundRecord) -> None:
    """Add a round; raises `CheckpointError`."""
    try:
        with (folder / ROUNDS).open("a") as stream:
            stream.write(_line(record))
    except OSError as error:
        raise CheckpointError(f"cannot write '{folder / ROUNDS}' ({error.strerror}): free some space") from error


def read_rounds(folder: Path) -> list[RoundRecord]:
    """The rounds of the folder's run; half a line at the end, of a run that was killed, is passed over.

    Raises:
        CheckpointError: another line is none.
    """
    path = folder / ROUNDS
    try:
        whole = path.read_text().split("\n")[:-1] if path.exists() else []
        return [RoundRecord(**json.loads(line)) for line in whole]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"cannot read '{path}' ({error}): resume the run, it writes the file anew") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, as long as the process lives at most; raises `FederationError` when another run holds it."""
    refusal = FederationError(f"another run is under way in '{folder}': end it first, or wait for it")
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
