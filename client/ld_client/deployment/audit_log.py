"""The audit log of a site: JSON lines about what ran and what left, each with the hash of the line before.

Each entry has a random salt, so that its hash, which the server receives, reveals nothing about its content. The file
`audit.head` beside the log is the signed head of its last entry; it shows when the log was cut short. Whoever holds the
site's key can forge a log, but not one with the heads that the server has seen (`ld_common.protocol.attestation`).

opened        site, study, key            asked, task         a message of the server
approved, withdrawn   a kit               acknowledged        a head that the server holds
training      a round on the data         left                what was sent: names, sizes, hashes
head          a signed head               refused             error code and reason
dry-run       a round that is not sent    recovered, broken   what an interrupted or altered file looked like
consent       a patient withdrew: counts
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
from ld_common.core.strict_json import read_json
from ld_common.protocol.attestation import AuditHead, head_from_record, head_record, sign_head
from ld_common.protocol.keys import PrivateKey, canonical, fingerprint

CONSENT = "consent"
"""Event of a patient's withdrawal, with the number of all withdrawals so far."""
FIRST = "0" * 64
"""`previous` of the first entry."""
BLOCK = 65536
MAX_LOG_BYTES = 2**27
"""Of a log that is verified: some hundred thousand entries."""


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
        """The entry's line in the file, without its newline."""
        return canonical(asdict(self))


class AuditLog:
    """The log of a site's home; several processes may write to it."""

    def __init__(self, path: Path, site: str, study: str, key: PrivateKey) -> None:
        self.path, self.site, self.study, self.key = path, site, study, key

    @classmethod
    def of(cls, home: SiteHome) -> AuditLog:
        """The log of a home; raises `LdError` when its kit or its key cannot be used."""
        kit = home.kit()
        return cls(home.audit_log, kit.site, kit.study, home.signing_key())

    def append(self, event: str, details: dict[str, Any]) -> AuditHead:
        """Write an entry to disk and return its signed head.

        An unfinished line of a killed process is dropped, and a log that does not match its own head is noted, each in
        a separate entry before this one.

        Raises:
            DeploymentError: the log cannot be written, or its last line cannot be read.
        """
        try:
            with self._locked() as stream:
                last, torn = _tail(stream)
                if torn:
                    stream.truncate(stream.seek(0, os.SEEK_END) - torn)
                    os.fsync(stream.fileno())
                mismatch = self._mismatch(last)
                if last is None:
                    last = self._write(stream, None, "opened", self._opening())
                if torn:
                    last = self._write(stream, last, "recovered", {"dropped_bytes": torn})
                if mismatch is not None:
                    last = self._write(stream, last, "broken", mismatch)
                return self._head(self._write(stream, last, event, details))
        except OSError as error:
            raise DeploymentError(
                f"cannot write the audit log '{self.path}' ({error.strerror or error}): nothing runs without it"
            ) from error

    def _opening(self) -> dict[str, Any]:
        return {"site": self.site, "study": self.study, "key": fingerprint(self.key.public_key())}

    def _mismatch(self, last: LogEntry | None) -> dict[str, Any] | None:
        """How the log differs from the head beside it; None when they agree.

        A process that is killed between an entry and its head leaves the log one entry ahead; that head is written now.
        """
        head = read_head(self.path)
        sequence, digest = (0, FIRST) if head is None else (head.sequence, head.hash)
        end, end_digest = (0, FIRST) if last is None else (last.sequence, last.hash)
        if (end, end_digest) == (sequence, digest):
            return None
        if last is not None and (end, last.previous) == (sequence + 1, digest):
            self._write_head(last)
            return None
        return {"kept_head": None if head is None else head_record(head), "log_ended_at": end}

    def _write(self, stream: IO[bytes], last: LogEntry | None, event: str, details: dict[str, Any]) -> LogEntry:
        entry = make_entry(last, event, {**details, "salt": secrets.token_hex(16)})
        stream.seek(0, os.SEEK_END)
        stream.write(entry.line() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
        self._write_head(entry)
        return entry

    def _write_head(self, entry: LogEntry) -> None:
        write_bytes(head_file(self.path), canonical(head_record(self._head(entry))))

    def _head(self, entry: LogEntry) -> AuditHead:
        return sign_head(self.key, AuditHead(self.site, self.study, entry.sequence, entry.hash, entry.time))

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield stream


def make_entry(last: LogEntry | None, event: str, details: dict[str, Any]) -> LogEntry:
    """The entry that follows `last`, with the present time."""
    content: dict[str, Any] = {
        "sequence": 1 if last is None else last.sequence + 1,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "event": event,
        "details": details,
        "previous": FIRST if last is None else last.hash,
    }
    return LogEntry(**content, hash=entry_hash(content))


def entry_hash(content: dict[str, Any]) -> str:
    """SHA-256 of an entry without its hash, in hex."""
    covered = {name: value for name, value in content.items() if name != "hash"}
    return hashlib.sha256(canonical(covered)).hexdigest()


def parse_line(line: bytes) -> LogEntry:
    """The entry of a line; raises `ValueError` unless this software would write exactly these bytes for it."""
    try:
        content = read_json(line)
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
    """File of the signed head of a log's last entry."""
    return log.with_suffix(".head")


def read_head(log: Path) -> AuditHead | None:
    """The head beside a log, or None; raises `DeploymentError` for one that cannot be read."""
    path = head_file(log)
    try:
        return head_from_record(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DeploymentError(f"'{path}' cannot be read: keep a copy, and run ld-client audit verify") from error


def read_log(log: Path) -> tuple[bytes, AuditHead | None]:
    """A log's bytes and the head beside it, read together; raises `DeploymentError`."""
    try:
        with log.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            content = stream.read(MAX_LOG_BYTES + 1)
            if len(content) > MAX_LOG_BYTES:
                raise DeploymentError(f"'{log}' has more than the {MAX_LOG_BYTES} bytes of a log that are read")
            return content, read_head(log)
    except FileNotFoundError:
        return b"", read_head(log)
    except OSError as error:
        raise DeploymentError(f"cannot read '{log}': {error.strerror or error}") from error


def log_entries(log: Path) -> list[LogEntry]:
    """A log's complete entries, oldest first; raises `DeploymentError` for a line that is not one."""
    content = read_log(log)[0]
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    try:
        return [parse_line(line) for line in lines]
    except ValueError as error:
        raise DeploymentError(f"a line of the audit log '{log}' was altered: run ld-client audit verify") from error


def last_entry(log: Path, events: set[str]) -> LogEntry | None:
    """The last entry of one of these events, or None; raises `DeploymentError`."""
    return next((entry for entry in reversed(log_entries(log)) if entry.event in events), None)


def check_holds(log: Path, head: AuditHead) -> None:
    """Raise `DeploymentError` unless the log holds the entry of a head that the server kept."""
    entries = log_entries(log)
    if len(entries) < head.sequence or entries[head.sequence - 1].hash != head.hash:
        raise DeploymentError(
            f"the audit log '{log}' lacks entry {head.sequence} of {head.time}, whose head the server holds: this home "
            "was put back from an older copy, so approvals, ledger and secure rounds may be behind. Restore the newest "
            "copy, or remove the folder keys, and enrol and approve anew"
        )


def _tail(stream: IO[bytes]) -> tuple[LogEntry | None, int]:
    """The last complete entry, and the number of bytes of an unfinished one after it.

    Raises:
        DeploymentError: the last complete line is not an entry, or its hash is wrong.
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
            raise ValueError("its hash is wrong")
    except ValueError as error:
        raise DeploymentError(
            f"the last line of the audit log '{stream.name}' was altered: run ld-client audit verify, and move "
            "the file to a safe place before the site continues"
        ) from error
    return entry, torn
