"""A site's signature over each result, for one task, and over the head of its audit log.

Each task carries a nonce of the server and the last head that the server holds of the site. So a result cannot be
another site's, an earlier round's or altered; and a log that was cut short or rewritten lacks a head that the
server has seen.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import pairwise
from typing import Any

from ld_common.core.errors import SignatureError
from ld_common.protocol.keys import PrivateKey, PublicKey, Purpose, canonical, is_digest, is_line, sign, verify

MAX_SIGNATURE = 200
"""Characters of base64; one on NIST P-384 has 140 at most."""


@dataclass(frozen=True)
class AuditHead:
    """The last entry of a site's audit log at some time; its hash covers all entries up to it."""

    site: str
    study: str
    """The study's name."""
    sequence: int
    """Number of the entry, from 1."""
    hash: str
    """Hex."""
    time: str
    """Time of the entry; ISO 8601, UTC."""
    signature: str = ""
    """By the site's key, over all other fields."""


@dataclass(frozen=True)
class Statement:
    """What a site signs: that this content is its result of this task."""

    study: str
    """Digest of the study."""
    site: str
    round: int
    nonce: str
    """The task's."""
    content: str
    """`TrainResult.content_digest()`."""


@dataclass(frozen=True)
class Attestation:
    """A statement's signature, and the head of the site's log after the result was recorded."""

    signature: str
    """By the site's key, over the statement and the head."""
    head: AuditHead


def new_nonce() -> str:
    """128 random bits in hex, for one site and round."""
    return secrets.token_hex(16)


def attest(key: PrivateKey, statement: Statement, head: AuditHead) -> Attestation:
    """Sign a statement together with a head of `sign_head`."""
    return Attestation(sign(key, Purpose.RESULT, _attested(statement, head)), head)


def check_attestation(
    key: PublicKey, expected: Statement, attestation: Attestation | None, study_name: str
) -> AuditHead:
    """Check a result's attestation; returns the head, to be sent with the site's next task.

    Args:
        key: the site's, from the server's own list.
        expected: the task, with the digest of the received content.
        attestation: of the result.
        study_name: the name in the head.

    Raises:
        SignatureError: there is none, another key signed it, it is of another task, or the content was altered.
    """
    if attestation is None:
        raise SignatureError(f"the result of site '{expected.site}' is not signed: only signed results count")
    verify(key, Purpose.RESULT, _attested(expected, attestation.head), attestation.signature)
    check_head(key, attestation.head, expected.site, study_name)
    return attestation.head


def sign_head(key: PrivateKey, head: AuditHead) -> AuditHead:
    """The head with its signature."""
    return replace(head, signature=sign(key, Purpose.AUDIT_HEAD, _unsigned(head)))


def check_head(key: PublicKey, head: AuditHead, site: str, study_name: str) -> None:
    """Raise `SignatureError` unless the key signed this head, for this site and study."""
    if (head.site, head.study) != (site, study_name):
        raise SignatureError(f"the head of the audit log is of site '{head.site}' and study '{head.study}'")
    verify(key, Purpose.AUDIT_HEAD, _unsigned(head), head.signature)


def shrinkages(heads: Sequence[AuditHead]) -> list[str]:
    """Where a site's audit log was cut short or rewritten, by its checked heads in the order of their arrival.

    A log only grows: a later head with the same or a smaller number is of another log. A log that was rewritten and has
    grown past an older head is detected by `ld-client audit verify` at the site.
    """
    return [
        f"its audit log had {before.sequence} entries on {before.time} and {after.sequence} on {after.time}: "
        "it was cut short or rewritten in between"
        for before, after in pairwise(heads)
        if after.sequence <= before.sequence
    ]


def head_record(head: AuditHead) -> dict[str, str | int]:
    """A head as plain values."""
    return asdict(head)


def head_from_record(record: Mapping[str, Any]) -> AuditHead:
    """The head of `head_record`, with each field checked, as others read it.

    Raises:
        KeyError, ValueError: it is not a head.
    """
    head = AuditHead(**{name: record[name] for name in ("site", "study", "sequence", "hash", "time", "signature")})
    numbered = type(head.sequence) is int and 1 <= head.sequence < 2**53  # exact in JSON
    named = is_line(head.site) and is_line(head.study) and is_digest(head.hash)
    if not (numbered and named and _is_time(head.time) and _is_signature(head.signature)):
        raise ValueError("not the head of an audit log")
    return head


def plain(value: object) -> Any:
    """A message's value as JSON, with bytes replaced by their size and hash."""
    if isinstance(value, bytes):
        return {"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def content_digest(content: Any) -> str:
    """SHA-256 over canonical JSON, in hex; raises `SignatureError` for values without one, such as NaN."""
    try:
        return hashlib.sha256(canonical(content)).hexdigest()
    except (ValueError, TypeError) as error:
        raise SignatureError("a result holds a number that is not finite, or a value of an unknown type") from error


def _is_time(value: object) -> bool:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9TZ:.+-]{1,40}", value):
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


def _is_signature(value: object) -> bool:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_SIGNATURE:
        return False
    try:
        base64.b64decode(value, validate=True)
    except ValueError:
        return False
    return True


def _unsigned(head: AuditHead) -> dict[str, Any]:
    return {name: value for name, value in asdict(head).items() if name != "signature"}


def _attested(statement: Statement, head: AuditHead) -> dict[str, Any]:
    return {"statement": asdict(statement), "head": asdict(head)}
