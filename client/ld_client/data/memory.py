"""What the last indexes found in each file, so that the next one reads only files that are new or changed.

An entry's key is a keyed hash of what it holds, the file's path, size and times, and what the result depends on; its
value is sealed with a key that follows from the store's. So `memory.sqlite` tells nothing to whoever lacks the store's
key. Withdrawing consent deletes the whole file, and each index drops the entries that it did not use.

A refusal that another try may not repeat, such as a missing decoder or a slow disk, is never remembered.
"""

from __future__ import annotations

import functools
import hmac
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ld_client.data.contradictions import content_digest
from ld_client.data.site_files import relative_name
from ld_common.core.errors import StoreError
from ld_common.core.version import installed_version
from ld_common.imaging.rejection import Rejection

MEMORY = "memory.sqlite"
SETTLED_SECONDS = 2.0
"""A file that was written within this time before the index began may change again without a change of its times."""
COMMIT_SECONDS = 10.0
NONCE_BYTES = 12
PASSING = frozenset((Rejection.UNREADABLE.value, Rejection.NO_DECODER.value, Rejection.TOO_LARGE.value))
"""Refusals that another try may not repeat."""
Value = dict[str, Any]


@dataclass
class FileMemory:
    """Values that follow from files, by kind and files. Its methods may be called from several threads."""

    root: Path
    """The data's root, to which paths in keys are relative."""
    _key: bytes
    _database: sqlite3.Connection
    _entries: dict[bytes, bytes]
    _used: set[bytes] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _began: float = field(default_factory=time.time)
    _committed: float = field(default_factory=time.monotonic)

    @functools.cached_property
    def _cipher(self) -> AESGCM:
        return AESGCM(self._key)

    @classmethod
    def open(cls, store: Path, root: Path, key: bytes, anew: bool = False) -> FileMemory:
        """The memory of a store; empty with `anew`, and where the file is damaged.

        Raises:
            StoreError: it cannot be used, for example as another index has it.
        """
        own = hmac.digest(key, b"latent-drift-federation/memory", "sha256")
        try:
            if anew:
                forget(store)
            try:
                return cls(root, own, *_opened(store / MEMORY))
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                forget(store)
                return cls(root, own, *_opened(store / MEMORY))
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot use '{store / MEMORY}' ({error}): does another ld-client index run?") from error

    def key(self, kind: str, files: Sequence[Path], *depends: object, root: Path | None = None) -> bytes | None:
        """Key of a value that follows from these files and settings; None where a file may still change.

        Args:
            kind: of the value.
            files: below the data's root, or below `root` where it is given.
            depends: settings, which JSON can hold.
            root: folder of files that are no data.
        """
        stated = []
        for path in files:
            try:
                status = path.stat()
            except OSError:
                return None
            if max(status.st_mtime, status.st_ctime) > self._began - SETTLED_SECONDS:
                return None
            place = relative_name(path, root or self.root).encode("utf-8", "surrogateescape").hex()
            stated.append((place, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        text = json.dumps([kind, installed_version(), stated, depends], default=str)
        return hmac.digest(self._key, text.encode(), "sha256")

    def get(self, key: bytes | None, keep: bool = True) -> Value | None:
        """The value of a key, None where there is none; with `keep` the next index has it as well.

        Without, `finish` drops it, unless it was put or got otherwise.
        """
        sealed = None if key is None else self._entries.get(key)
        if key is None or sealed is None:
            return None
        try:
            value = json.loads(self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], key))
        except (InvalidTag, ValueError):
            return None  # of a store with another key, or damaged
        if keep:
            self._used.add(key)
        return dict(value)

    def put(self, key: bytes | None, value: Value, keep: bool = True) -> None:
        """Remember a value, on disk within seconds; without `keep`, until an index is complete.

        Raises:
            StoreError: the disk is full, for example.
        """
        if key is None or value.get("rejection") in PASSING:
            return
        nonce = secrets.token_bytes(NONCE_BYTES)
        sealed = nonce + self._cipher.encrypt(nonce, json.dumps(value).encode(), key)
        if keep:
            self._used.add(key)
        try:
            with self._lock:
                self._database.execute("INSERT OR REPLACE INTO entries VALUES (?, ?)", (key, sealed))
                if time.monotonic() - self._committed > COMMIT_SECONDS:
                    self._database.commit()
                    self._committed = time.monotonic()
        except sqlite3.Error as error:
            raise StoreError(f"cannot write '{MEMORY}' of the store: {error}") from error

    def content_digest(self, path: Path) -> str:
        """SHA-256 of a file's content, hex; raises `OSError`."""
        key = self.key("content", [path])
        known = self.get(key)
        if known is not None:
            return str(known["sha256"])
        digest = content_digest(path)
        self.put(key, {"sha256": digest})
        return digest

    def finish(self) -> None:
        """Drop the entries that this index did not use, as it is complete; raises `StoreError`."""
        try:
            with self._lock:
                present = [key for (key,) in self._database.execute("SELECT key FROM entries")]
                gone = [(key,) for key in present if key not in self._used]
                self._database.executemany("DELETE FROM entries WHERE key = ?", gone)
                self._database.commit()
                if gone:
                    self._database.execute("VACUUM")
        except sqlite3.Error as error:
            raise StoreError(f"cannot write '{MEMORY}' of the store: {error}") from error

    def close(self) -> None:
        """Write what is left: an index that stopped goes on from there."""
        try:
            self._database.commit()
        except sqlite3.Error as error:
            raise StoreError(f"cannot write '{MEMORY}' of the store: {error}") from error
        finally:
            self._database.close()


def forget(store: Path) -> None:
    """Delete a store's memory."""
    for path in store.glob(f"{MEMORY}*"):
        path.unlink(missing_ok=True)


def _opened(path: Path) -> tuple[sqlite3.Connection, dict[bytes, bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(0o600)
    path.chmod(0o600)
    database = sqlite3.connect(path, check_same_thread=False)
    try:
        database.execute("PRAGMA secure_delete = ON")
        database.execute("CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")
        return database, dict(database.execute("SELECT key, value FROM entries").fetchall())
    except sqlite3.Error:
        database.close()
        raise
