"""`ld-client audit verify`: whether an audit log is whole, line by line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ld_client.deployment.audit_log import FIRST, LogEntry, entry_hash, parse_line, read_log
from ld_client.deployment.site_home import SiteHome
from ld_common.core.errors import LdError
from ld_common.protocol.attestation import AuditHead, check_head, head_from_record
from ld_common.protocol.keys import PublicKey, fingerprint

HEADS = {"head": "a head that was sent", "acknowledged": "a head that the server holds"}


@dataclass
class Verdict:
    """What is to be said of a log."""

    entries: int = 0
    acknowledged: int = 0
    """Number of the last entry that the server has seen the head of, 0 for none."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a killed process leaves behind, and what nobody can vouch for."""


def verify_home(home: SiteHome) -> Verdict:
    """Check the log of a home; raises `LdError` when kit, key or log cannot be read."""
    kit, key = home.kit(), home.key().public_key()
    content, kept = read_log(home.audit_log)
    return verify_log(content, kept, key, kit.site, kit.study)


def verify_log(content: bytes, kept: AuditHead | None, key: PublicKey, site: str, study: str) -> Verdict:
    """Check the bytes of a log against its own chain, its signatures and the heads that others hold.

    Args:
        content: of the file.
        kept: the head that lies beside it.
        key: the site's.
        site: the site's name.
        study: the study's name.
    """
    verdict = Verdict()
    *lines, rest = content.split(b"\n")
    entries: dict[int, LogEntry] = {}
    """Line -> entry."""
    for number, line in enumerate(lines, start=1):
        try:
            entries[number] = parse_line(line)
        except ValueError:
            verdict.problems.append(f"line {number}: altered: it is no entry")
    verdict.entries = len(entries)
    _check_chain(entries, len(lines), verdict)
    _check_events(entries, verdict, key, site, study)
    _check_end(entries, kept, verdict, key, site, study)
    if rest:
        verdict.notes.append(
            f"line {len(lines) + 1}: unfinished, {len(rest)} bytes: a process was killed while it wrote; the next "
            "entry will say so"
        )
    return verdict


def _check_chain(entries: Mapping[int, LogEntry], lines: int, verdict: Verdict) -> None:
    expected, number, seen = FIRST, 1, dict[str, int]()
    """Hash and number that the next entry should name."""
    for line in range(1, lines + 1):
        entry = entries.get(line)
        if entry is None:  # named already; what follows says what it was chained to
            following = entries.get(line + 1)
            expected, number = ("" if following is None else following.previous), number + 1
            continue
        if entry.hash != entry_hash(asdict(entry)):
            verdict.problems.append(f"line {line}: altered: its hash does not hold")
        if entry.hash in seen:
            verdict.problems.append(f"line {line}: a duplicate of line {seen[entry.hash]}")
        elif entry.sequence > number:
            verdict.problems.append(f"line {line}: {entry.sequence - number} entries before it were cut out")
        elif entry.sequence < number:
            verdict.problems.append(f"line {line}: entry {entry.sequence} is out of its place, or was inserted")
        elif entry.previous != expected:
            verdict.problems.append(f"line {line}: it does not follow the line before: one of them was altered")
        seen.setdefault(entry.hash, line)
        expected, number = entry.hash, entry.sequence + 1


def _check_events(entries: Mapping[int, LogEntry], verdict: Verdict, key: PublicKey, site: str, study: str) -> None:
    hashes = {entry.sequence: entry.hash for entry in entries.values()}
    first = entries.get(1)
    if first is not None and not _opens(first, key, site, study):
        verdict.problems.append("line 1: this is not how the log of this site, study and key was opened")
    for line, entry in entries.items():
        if entry.event in HEADS:
            try:
                head = head_from_record(entry.details)
                check_head(key, head, site, study)
            except (LdError, KeyError, ValueError, TypeError) as error:
                verdict.problems.append(f"line {line}: {HEADS[entry.event]} and is not this site's own: {error}")
                continue
            if hashes.get(head.sequence) != head.hash:
                verdict.problems.append(
                    f"line {line}: {HEADS[entry.event]}, of entry {head.sequence}, is not in the log: it was cut short "
                    "or rewritten since"
                )
            elif entry.event == "acknowledged":
                verdict.acknowledged = max(verdict.acknowledged, head.sequence)
        elif entry.event == "broken":
            verdict.problems.append(f"line {line}: {_broken(entry.details)}")
        elif entry.event == "recovered":
            verdict.notes.append(f"line {line}: a killed process had left an unfinished line, which was dropped")


def _check_end(
    entries: Mapping[int, LogEntry], kept: AuditHead | None, verdict: Verdict, key: PublicKey, site: str, study: str
) -> None:
    last = entries[max(entries)] if entries else None
    if kept is None:
        if last is not None and last.sequence > 1:
            verdict.problems.append("audit.head is missing: nothing says where the log ended")
        return
    try:
        check_head(key, kept, site, study)
    except LdError as error:
        verdict.problems.append(f"audit.head: {error}")
        return
    hashes = {entry.sequence: entry.hash for entry in entries.values()}
    end = 0 if last is None else last.sequence
    if hashes.get(kept.sequence) != kept.hash:
        verdict.problems.append(
            f"line {len(entries) + 1}: the log was cut short or rewritten: audit.head says that it held entry "
            f"{kept.sequence} ({kept.hash[:16]}), it ends with {end}"
        )
    elif end > kept.sequence + 1:
        verdict.problems.append(f"the {end - kept.sequence} entries after {kept.sequence} were not signed: inserted")
    elif end == kept.sequence + 1:
        verdict.notes.append(f"entry {end} was not signed: a process was killed right after it")


def _opens(entry: LogEntry, key: PublicKey, site: str, study: str) -> bool:
    said = {name: value for name, value in entry.details.items() if name != "salt"}
    return entry.event == "opened" and said == {"site": site, "study": study, "key": fingerprint(key)}


def _broken(details: Mapping[str, Any]) -> str:
    kept = details.get("kept_head") or {}
    return (
        f"the log was found cut short or rewritten: it ended at entry {details.get('log_ended_at')}, its head was of "
        f"entry {kept.get('sequence', 'unknown')}"
    )


def verdict_lines(verdict: Verdict) -> list[str]:
    """What to print."""
    lines = [f"{verdict.entries} entries"]
    if verdict.acknowledged:
        lines[0] += f", the server has seen the log up to entry {verdict.acknowledged}"
    elif verdict.entries:
        lines[0] += ", and the server has not yet acknowledged any"
    return lines + [f"note: {note}" for note in verdict.notes] + [f"PROBLEM: {problem}" for problem in verdict.problems]
