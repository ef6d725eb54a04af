"""Files that are either the old one or the new one, never half of either."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from ld_common.errors import CheckpointError


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step, flushed to disk; raises `CheckpointError`, the old file intact."""
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write '{path}' ({error.strerror or error}): free some space; what was there before is whole"
        ) from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex; raises `OSError`."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
