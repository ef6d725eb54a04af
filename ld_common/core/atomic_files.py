"""Atomic file replacement, file locks and file hashes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from ld_common.core.errors import CheckpointError, LdError


def write_bytes(path: Path, content: bytes, mode: int | None = None) -> None:
    """Replace a file atomically and flush it to disk. Of several concurrent writers, the last one wins.

    Args:
        path: file to replace; its folder is made.
        content: its new content.
        mode: permissions, such as 0o600; by default 0o644 less the umask.

    Raises:
        CheckpointError: the file cannot be written; the old one is intact.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644 if mode is None else 0o600)
        with os.fdopen(number, "wb") as stream:
            if mode is not None:
                os.fchmod(number, mode)
            stream.write(content)
            stream.flush()
            os.fsync(number)
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write '{path}' ({error.strerror or error}): check permissions and free space; "
            "the old file is intact"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    _flush_folder(path.parent)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that must not exist yet, mode 0600 from its first byte; its folder is made. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(content)


@contextlib.contextmanager
def held(path: Path, refusal: LdError | None = None) -> Iterator[None]:
    """Hold a lock file until the block or the process ends.

    Args:
        path: the file, made with mode 0600 where it is missing.
        refusal: raised if another process or thread holds the lock; None waits for it.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if refusal is None else fcntl.LOCK_NB))
        except OSError as error:
            raise error if refusal is None else refusal from error
        yield


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex; raises `OSError`."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush_folder(folder: Path) -> None:
    # some network file systems cannot flush a folder; the file is complete anyway
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
