"""`ld-client audit verify`: checks an audit log line by line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ld_client.deployment.audit_log import FIRST, LogEntry, entry_hash, parse_line, read_log
from ld_client.deployment.site_home import SiteHome
from ld_common.core.errors import LdError
from ld_common.protocol.attestation import AuditHead, check_head, head_from_record
from ld_common.protocol.keys import PublicKey, fingerprint

MOST_PROBLEMS = 1000
HEADS = {"head": "a head that was sent", "acknowledged": "a head that the server holds"}
"""Events that carry a head, and what it is."""


@dataclass(frozen=True)
class LogOwner:
    """Whose log is verified."""

    key: PublicKey
    """The site's."""
    site: str
    study: str
    """Its name."""

    def check(self, head: AuditHead) -> None:
        """Raise `SignatureError` unless this site signed the head, for this study."""
        check_head(self.key, head, self.site, self.study)


@dataclass
class Verdict:
    """Result of the verification of a log."""

    entries: int = 0
    acknowledged: int = 0
    """Number of the last entry whose head the server has seen; 0 for none."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Traces of killed processes, which are not problems."""


def verify_home(home: SiteHome) -> Verdict:
    """Check the log of a home; raises `LdError` when kit, key or log cannot be read."""
    kit, key = home.kit(), home.signing_key().public_key()
    content, head = read_log(home.audit_log)
    return verify_log(content, head, LogOwner(key, kit.site, kit.study))


def verify_log(content: bytes, head: AuditHead | None, owner: LogOwner) -> Verdict:
    """Check the bytes of a log against its chain, its signatures and the heads that were sent.

    Args:
        content: of the file.
        head: the head beside it.
        owner: whose log it is.
    """
    verdict = Verdict()
    *lines, rest = content.split(b"\n")
    entries: dict[int, LogEntry] = {}
    """Line -> entry."""
    for number, line in enumerate(lines, start=1):
        try:
            entries[number] = parse_line(line)
        except ValueError:
            verdict.problems.append(f"line {number}: altered: it is not an entry")
            if len(verdict.problems) == MOST_PROBLEMS:
                verdict.problems.append(f"line {number + 1}: the lines from here on were not read")
                del lines[number:]
                break
    verdict.entries = len(entries)
    _check_chain(entries, len(lines), verdict)
    _check_events(entries, verdict, owner)
    _check_end(entries, head, verdict, owner)
    if rest:
        verdict.notes.append(
            f"line {len(lines) + 1}: unfinished, {len(rest)} bytes: a process was killed while writing; the next "
            "entry will record it"
        )
    return verdict


def _check_chain(entries: Mapping[int, LogEntry], lines: int, verdict: Verdict) -> None:
    expected, number, seen = FIRST, 1, dict[str, int]()
    """`previous` and number of the next entry."""
    for line in range(1, lines + 1):
        entry = entries.get(line)
        if entry is None:  # reported already; the following entry shows its hash
            following = entries.get(line + 1)
            expected, number = ("" if following is None else following.previous), number + 1
            continue
        if entry.hash != entry_hash(asdict(entry)):
            verdict.problems.append(f"line {line}: altered: its hash is wrong")
        if entry.hash in seen:
            verdict.problems.append(f"line {line}: a duplicate of line {seen[entry.hash]}")
        elif entry.sequence > number:
            verdict.problems.append(f"line {line}: {entry.sequence - number} entries before it were removed")
        elif entry.sequence < number:
            verdict.problems.append(f"line {line}: entry {entry.sequence} is in the wrong place, or was inserted")
        elif entry.previous != expected:
            verdict.problems.append(f"line {line}: it does not follow the line before it: one of them was altered")
        seen.setdefault(entry.hash, line)
        expected, number = entry.hash, entry.sequence + 1


def _check_events(entries: Mapping[int, LogEntry], verdict: Verdict, owner: LogOwner) -> None:
    hashes = {entry.sequence: entry.hash for entry in entries.values()}
    first = entries.get(1)
    if first is not None and not _opens(first, owner):
        verdict.problems.append("line 1: the log was opened for another site, study or key")
    for line, entry in entries.items():
        if entry.event in HEADS:
            try:
                head = head_from_record(entry.details)
                owner.check(head)
            except (LdError, KeyError, ValueError, TypeError) as error:
                verdict.problems.append(f"line {line}: {HEADS[entry.event]}, but not signed by this site: {error}")
                continue
            if hashes.get(head.sequence) != head.hash:
                verdict.problems.append(
                    f"line {line}: {HEADS[entry.event]}, of entry {head.sequence}, is not in the log: the log was cut "
                    "short or rewritten since"
                )
            elif entry.event == "acknowledged":
                verdict.acknowledged = max(verdict.acknowledged, head.sequence)
        elif entry.event == "broken":
            verdict.problems.append(f"line {line}: {_broken(entry.details)}")
        elif entry.event == "recovered":
            verdict.notes.append(f"line {line}: an unfinished line of a killed process was dropped")


def _check_end(entries: Mapping[int, LogEntry], head: AuditHead | None, verdict: Verdict, owner: LogOwner) -> None:
    last = entries[max(entries)] if entries else None
    if head is None:
        if last is not None and last.sequence > 1:
            verdict.problems.append("audit.head is missing: the end of the log cannot be verified")
        return
    try:
        owner.check(head)
    except LdError as error:
        verdict.problems.append(f"audit.head: {error}")
        return
    hashes = {entry.sequence: entry.hash for entry in entries.values()}
    end = 0 if last is None else last.sequence
    if hashes.get(head.sequence) != head.hash:
        verdict.problems.append(
            f"line {len(entries) + 1}: the log was cut short or rewritten: audit.head is of entry "
            f"{head.sequence} ({head.hash[:16]}), the log ends with entry {end}"
        )
    elif end > head.sequence + 1:
        verdict.problems.append(
            f"the {end - head.sequence} entries after {head.sequence} are not signed: they were inserted"
        )
    elif end == head.sequence + 1:
        verdict.notes.append(f"entry {end} is not signed: a process was killed after writing it")


def _opens(entry: LogEntry, owner: LogOwner) -> bool:
    details = {name: value for name, value in entry.details.items() if name != "salt"}
    expected = {"site": owner.site, "study": owner.study, "key": fingerprint(owner.key)}
    return entry.event == "opened" and details == expected


def _broken(details: Mapping[str, Any]) -> str:
    head = details.get("kept_head") or {}
    return (
        f"the log had been cut short or rewritten: it ended at entry {details.get('log_ended_at')}, its head was of "
        f"entry {head.get('sequence', 'unknown')}"
    )


def verdict_lines(verdict: Verdict) -> list[str]:
    """The verdict as text."""
    lines = [f"{verdict.entries} entries"]
    if verdict.acknowledged:
        lines[0] += f", the server has seen the log up to entry {verdict.acknowledged}"
    elif verdict.entries:
        lines[0] += ", none of them acknowledged by the server yet"
    return lines + [f"note: {note}" for note in verdict.notes] + [f"PROBLEM: {problem}" for problem in verdict.problems]
