"""Who a patient is outside the site's own records: a pseudonym, under a key that never leaves the site."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from ld_common.core.errors import StoreError

KEY_FILE = "site.key"


def load_key(store: Path) -> bytes:
    """The site's key of 32 bytes, made on first use with mode 0600; it never leaves the site.

    Raises:
        StoreError: a key that others may read, or that is not 32 bytes, or a folder that cannot be written.
    """
    path = store / KEY_FILE
    if not path.exists():
        write_key(store, secrets.token_bytes(32))
    try:
        key, mode = path.read_bytes(), path.stat().st_mode & 0o777
    except OSError as error:
        raise StoreError(f"cannot use the site's key '{path}': {error.strerror or error}") from error
    if mode & 0o077:
        raise StoreError(f"others may read the site's key '{path}' (mode {mode:o}): run chmod 600 on it")
    if len(key) != 32:
        raise StoreError(f"the site's key '{path}' has {len(key)} bytes, not 32: restore it from a backup")
    return key


def write_key(store: Path, key: bytes) -> None:
    """Give a new store its key of 32 bytes, mode 0600: one restored, or a demo's own, which is no secret.

    Raises:
        StoreError: the store has a key, or its folder cannot be written.
    """
    path = store / KEY_FILE
    try:
        store.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(key)
    except OSError as error:
        raise StoreError(f"cannot write the site's key '{path}': {error.strerror or error}") from error


def pseudonym(key: bytes, patient: str) -> str:
    """HMAC-SHA256 of a patient's identifier, its first 128 bits in hex."""
    return hmac.new(key, patient.encode(), hashlib.sha256).hexdigest()[:32]
