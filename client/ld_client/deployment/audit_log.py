"""What ran on a site's data and what left: a file of JSON lines, each with the hash of the one before.

Each entry carries random salt, so that its hash, which the server is told, says nothing of what stands in it. Beside
the log lies `audit.head`, the signed head of its last entry: with it a log that ends too early is found. Who holds the
site's key can make up another log, but none with the heads that the server has seen (`ld_common.protocol.attestation`).

opened        by whom                     asked, task     what the server wants
approved, withdrawn   a kit's code        acknowledged    a head that the server holds
training      a round on the data         left            what was sent: names, sizes, hashes
head          a head that was signed      refused         code and reason
dry-run       a round that was not sent   recovered, broken   what this file's last writer found
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from ld_client.deployment.site_home import SiteHome
from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import DeploymentError
from ld_common.protocol.attestation import AuditHead, head_from_record, head_record, sign_head
from ld_common.protocol.keys import PrivateKey, canonical, fingerprint

FIRST = "0" * 64
"""What the first entry has for the hash of the one before."""
BLOCK = 65536


@dataclass(frozen=True)
class LogEntry:
    """One line of the log."""

    sequence: int
    time: str
    """UTC, ISO 8601."""
    event: str
    details: dict[str, Any]
    previous: str
    """Hash of the entry before, hex."""
    hash: str

    def line(self) -> bytes:
        """The entry as it stands in the file, without its newline."""
        return canonical(asdict(self))


class AuditLog:
    """The log of one site's home; several processes may write to it."""

    def __init__(self, path: Path, site: str, study: str, key: PrivateKey) -> None:
        self.path, self.site, self.study, self.key = path, site, study, key

    @classmethod
    def of(cls, home: SiteHome) -> AuditLog:
        """The log of a home; raises `LdError` when its kit or its key cannot be used."""
        kit = home.kit()
        return cls(home.audit_log, kit.site, kit.study, home.key())

    def append(self, event: str, details: dict[str, Any]) -> AuditHead:
        """Write an entry to disk and return its signed head.

        A line that a killed process left unfinished is dropped, and what the log lacks of its own head is noted, each
        in an entry of its own before this one.

        Raises:
            DeploymentError: the log cannot be written, or its last line cannot be read.
        """
        try:
            with self._locked() as stream:
                last, torn = _tail(stream)
                if torn:
                    stream.truncate(stream.seek(0, os.SEEK_END) - torn)
                    os.fsync(stream.fileno())
                found = self._missing(last)
                if last is None:
                    last = self._write(stream, None, "opened", self._opening())
                if torn:
                    last = self._write(stream, last, "recovered", {"dropped_bytes": torn})
                if found is not None:
                    last = self._write(stream, last, "broken", found)
                return self._head(self._write(stream, last, event, details))
        except OSError as error:
            raise DeploymentError(
                f"cannot write the audit log '{self.path}' ({error.strerror or error}): nothing runs without it"
            ) from error

    def _opening(self) -> dict[str, Any]:
        return {"site": self.site, "study": self.study, "key": fingerprint(self.key.public_key())}

    def _missing(self, last: LogEntry | None) -> dict[str, Any] | None:
        """What the head that was kept says the log should hold and it does not; None when they agree.

        A process may be killed between an entry and its head: the log is one entry ahead, whose head is then kept now.
        """
        kept = read_head(self.path)
        sequence, digest = (0, FIRST) if kept is None else (kept.sequence, kept.hash)
        end, held = (0, FIRST) if last is None else (last.sequence, last.hash)
        if (end, held) == (sequence, digest):
            return None
        if last is not None and (end, last.previous) == (sequence + 1, digest):
            self._keep_head(last)
            return None
        return {"kept_head": None if kept is None else head_record(kept), "log_ended_at": end}

    def _write(self, stream: IO[bytes], last: LogEntry | None, event: str, details: dict[str, Any]) -> LogEntry:
        entry = make_entry(last, event, {**details, "salt": secrets.token_hex(16)})
        stream.seek(0, os.SEEK_END)
        stream.write(entry.line() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
        self._keep_head(entry)
        return entry

    def _keep_head(self, entry: LogEntry) -> None:
        write_bytes(head_file(self.path), canonical(head_record(self._head(entry))))

    def _head(self, entry: LogEntry) -> AuditHead:
        return sign_head(self.key, AuditHead(self.site, self.study, entry.sequence, entry.hash, entry.time))

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield stream


def make_entry(last: LogEntry | None, event: str, details: dict[str, Any]) -> LogEntry:
    """The entry after `last`, now."""
    content: dict[str, Any] = {
        "sequence": 1 if last is None else last.sequence + 1,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "event": event,
        "details": details,
        "previous": FIRST if last is None else last.hash,
    }
    return LogEntry(**content, hash=entry_hash(content))


def entry_hash(content: dict[str, Any]) -> str:
    """SHA-256 of an entry without its own hash, in hex."""
    covered = {name: value for name, value in content.items() if name != "hash"}
    return hashlib.sha256(canonical(covered)).hexdigest()


def parse_line(line: bytes) -> LogEntry:
    """The entry of a line; raises `ValueError` unless the line is, byte for byte, what such an entry is written as."""
    try:
        content = json.loads(line)
    except RecursionError as error:
        raise ValueError("not an entry of an audit log") from error
    kinds = {"sequence": int, "time": str, "event": str, "details": dict, "previous": str, "hash": str}
    if not isinstance(content, dict) or {name: type(value) for name, value in content.items()} != kinds:
        raise ValueError("not an entry of an audit log")
    entry = LogEntry(**content)
    if entry.line() != line:
        raise ValueError("not written as this software writes an entry")
    return entry


def head_file(log: Path) -> Path:
    """Where the signed head of a log's last entry lies."""
    return log.with_suffix(".head")


def read_head(log: Path) -> AuditHead | None:
    """The head that was kept beside a log, or None; raises `DeploymentError` for one that cannot be read."""
    path = head_file(log)
    try:
        return head_from_record(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DeploymentError(f"'{path}' cannot be read: see what ld-client audit verify says, keep a copy") from error


def read_log(log: Path) -> tuple[bytes, AuditHead | None]:
    """A log's bytes and the head beside it, of one moment; raises `DeploymentError`."""
    try:
        with log.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            return stream.read(), read_head(log)
    except FileNotFoundError:
        return b"", read_head(log)
    except OSError as error:
        raise DeploymentError(f"cannot read '{log}': {error.strerror or error}") from error


def _tail(stream: IO[bytes]) -> tuple[LogEntry | None, int]:
    """The last whole entry, and how many bytes of an unfinished one follow it.

    Raises:
        DeploymentError: the last whole line is no entry whose hash holds.
    """
    end, length = stream.seek(0, os.SEEK_END), BLOCK
    while True:
        start = stream.seek(max(0, end - length))
        content = stream.read(end - start)
        whole = content.rfind(b"\n") + 1
        line_start = content.rfind(b"\n", 0, max(0, whole - 1)) + 1
        if line_start or not start:
            break
        length *= 2
    torn = len(content) - whole
    if not whole:
        return None, torn
    try:
        entry = parse_line(content[line_start : whole - 1])
        if entry.hash != entry_hash(asdict(entry)):
            raise ValueError("its hash does not hold")
    except ValueError as error:
        raise DeploymentError(
            f"the last line of the audit log '{stream.name}' was altered: see ld-client audit verify; keep the file, "
            "and move it away before the site goes on"
        ) from error
    return entry, torn
