"""The key of a store, `pseudonyms.key`: pseudonyms and the draws of training follow from it. It never leaves."""

from __future__ import annotations

import hmac
import secrets
from pathlib import Path

from ld_client.data.store_index import INDEX
from ld_client.data.withdrawals import WITHDRAWALS
from ld_common.core.atomic_files import write_new
from ld_common.core.errors import StoreError

KEY_FILE = "pseudonyms.key"
FORMER_KEY_FILE = "site.key"


def load_key(store: Path, ledger: Path | None = None) -> bytes:
    """The store's key of 32 bytes, made with mode 0600 where no data were used yet.

    Args:
        store: the store's folder.
        ledger: the data set's privacy ledger.

    Raises:
        StoreError: others may read the key, it is not 32 bytes long, it is missing though there is an index, a list of
            withdrawals or a ledger, or the folder cannot be written.
    """
    path = store / KEY_FILE
    if not path.exists() and (store / FORMER_KEY_FILE).exists():
        raise StoreError(f"the key of pseudonyms is now called '{path}': rename '{store / FORMER_KEY_FILE}' to it")
    traces = [store / INDEX, store / WITHDRAWALS, *([] if ledger is None else [ledger])]
    used = any(trace.exists() for trace in traces)
    if not path.exists() and used:
        raise StoreError(
            f"the key of pseudonyms '{path}' is missing: restore it from a backup. A new key gives every patient "
            "another pseudonym, so patients who were held out would train. Only another data set, with a "
            "store and a ledger of its own, may have a new one"
        )
    if not path.exists():
        write_key(store, secrets.token_bytes(32))
    try:
        key, mode = path.read_bytes(), path.stat().st_mode & 0o777
    except OSError as error:
        raise StoreError(f"cannot use the key of pseudonyms '{path}': {error.strerror or error}") from error
    if mode & 0o077:
        raise StoreError(f"others may read the key of pseudonyms '{path}' (mode {mode:o}): run chmod 600 on it")
    if len(key) != 32:
        raise StoreError(f"the key of pseudonyms '{path}' has {len(key)} bytes, not 32: restore it from a backup")
    return key


def write_key(store: Path, key: bytes) -> None:
    """Write the key of 32 bytes of a new store, mode 0600: a restored one, or a demo's, which is not secret.

    Raises:
        StoreError: the store has a key, or its folder cannot be written.
    """
    path = store / KEY_FILE
    try:
        write_new(path, key)
    except OSError as error:
        raise StoreError(f"cannot write the key of pseudonyms '{path}': {error.strerror or error}") from error


def training_secret(store: Path) -> bytes:
    """A secret from which the draws of training follow, derived from the store's key; raises `StoreError`."""
    return hmac.digest(load_key(store), b"latent-drift-federation/training draws", "sha256")
