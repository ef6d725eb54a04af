"""Keyed hashes of input scans, for records and DICOM identifiers.

Whoever holds a scan and an answer could match them by a plain hash. The key of 32 bytes lies beside trusted keys, in
`$XDG_CONFIG_HOME/latent-drift/answers.key`, mode 0600, and never leaves: under one account equal scans have equal
hashes, and nobody else can compute them.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import secrets
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ld_common.core.atomic_files import write_new
from ld_common.core.errors import ConfigError
from ld_common.release.trusted_keys import trusted_keys_file

KEY_BYTES = 32


def keyed_digest(parts: Iterable[bytes]) -> str:
    """HMAC-SHA-256 of the parts, one after the other, in hex.

    Raises:
        ConfigError: the account's key cannot be read, or others may read it.
    """
    digest = hmac.new(_key(answer_key_file()), digestmod="sha256")
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def describe_input(path: Path, pixels: Iterable[np.ndarray], mask: np.ndarray | None) -> dict[str, str | None]:
    """A record's entries about an input: keyed hashes of its name, its pixels and its preserve mask.

    Args:
        path: of the scan.
        pixels: its parts in order, for example the planes of a volume.
        mask: 1 where the scan is kept.
    """
    return {
        "hmac_of_name": keyed_digest([path.name.encode()]),
        "hmac_of_pixels": keyed_digest(part.tobytes() for part in pixels),
        "hmac_of_preserve_mask": None if mask is None else keyed_digest([mask.tobytes()]),
    }


def answer_key_file() -> Path:
    """Path of the account's key."""
    return trusted_keys_file().with_name("answers.key")


@functools.lru_cache(maxsize=1)
def _key(path: Path) -> bytes:
    new = secrets.token_bytes(KEY_BYTES)
    try:
        with contextlib.suppress(FileExistsError):
            write_new(path, new)
    except OSError:
        if not path.exists():  # a read-only home: hashes of this run alone
            return new
    try:
        key, mode = path.read_bytes(), path.stat().st_mode & 0o777
    except OSError as error:
        raise ConfigError(f"cannot read the key of input hashes '{path}': {error.strerror or error}") from error
    if mode & 0o077:
        raise ConfigError(f"others may read the key of input hashes '{path}' (mode {mode:o}): run chmod 600 on it")
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"the key of input hashes '{path}' has {len(key)} bytes, not {KEY_BYTES}: remove it, and later answers "
            "have other hashes"
        )
    return key
