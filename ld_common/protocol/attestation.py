"""What a site signs of each answer: the answer's content for one task, and the head of its audit log.

The server asks each site with a nonce of its own choice and tells it the last head that it holds of that site. So an
answer can neither be another site's, nor one of an earlier round, nor altered on its way; and a log that is cut short
or rewritten no longer holds a head that somebody else has seen.
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
    """The last entry of a site's audit log at some time; `hash` stands for all entries up to it."""

    site: str
    study: str
    """The study's name."""
    sequence: int
    """Number of the entry, from 1."""
    hash: str
    """Hex."""
    time: str
    """Of the entry; ISO 8601, UTC."""
    signature: str = ""
    """By the site's key, over all of the above."""


@dataclass(frozen=True)
class Statement:
    """What a site says by its signature: this content answers this task."""

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
    """A statement's signature, and the head of the site's log after the answer was written into it."""

    signature: str
    """By the site's key, over the statement and the head."""
    head: AuditHead


def new_nonce() -> str:
    """128 random bits in hex: one for each site and round."""
    return secrets.token_hex(16)


def attest(key: PrivateKey, statement: Statement, head: AuditHead) -> Attestation:
    """Sign a statement together with a head of `sign_head`."""
    return Attestation(sign(key, Purpose.RESULT, _attested(statement, head)), head)


def check_attestation(
    key: PublicKey, expected: Statement, attestation: Attestation | None, study_name: str
) -> AuditHead:
    """Check an answer's attestation; returns the head, to be kept and sent with the site's next task.

    Args:
        key: of the site that was asked, from the server's own list.
        expected: what was asked, with the digest of what came.
        attestation: what came with it.
        study_name: the study's name, which heads carry.

    Raises:
        SignatureError: there is none, another key signed it, it is of another task, or the content is not what was
            signed.
    """
    if attestation is None:
        raise SignatureError(f"the answer of site '{expected.site}' is not signed: only signed ones count")
    verify(key, Purpose.RESULT, _attested(expected, attestation.head), attestation.signature)
    check_head(key, attestation.head, expected.site, study_name)
    return attestation.head


def sign_head(key: PrivateKey, head: AuditHead) -> AuditHead:
    """The head with its signature."""
    return replace(head, signature=sign(key, Purpose.AUDIT_HEAD, _unsigned(head)))


def check_head(key: PublicKey, head: AuditHead, site: str, study_name: str) -> None:
    """Raise `SignatureError` unless the key signed this head, of this site's log of this study."""
    if (head.site, head.study) != (site, study_name):
        raise SignatureError(f"the head of an audit log is of site '{head.site}' and study '{head.study}'")
    verify(key, Purpose.AUDIT_HEAD, _unsigned(head), head.signature)


def shrinkages(heads: Sequence[AuditHead]) -> list[str]:
    """Where one site's audit log was cut short or rewritten, by the checked heads that somebody holds of it, in order.

    A log only grows: a later head with the same or a smaller number is of another log. One that was rewritten and has
    grown past the older head is found by the site's own `ld-client audit verify`, which knows the heads that came back.
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
    """The head of `head_record`, each part as our software writes it: it goes into records that others read.

    Raises:
        KeyError, ValueError: it is none.
    """
    head = AuditHead(**{name: record[name] for name in ("site", "study", "sequence", "hash", "time", "signature")})
    numbered = type(head.sequence) is int and 1 <= head.sequence < 2**53  # what JSON's readers hold exactly
    named = is_line(head.site) and is_line(head.study) and is_digest(head.hash)
    if not (numbered and named and _is_time(head.time) and _is_signature(head.signature)):
        raise ValueError("not the head of an audit log")
    return head


def plain(value: object) -> Any:
    """A value that a message can carry, as JSON: bytes by their hash, types kept apart."""
    if isinstance(value, bytes):
        return {"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def content_digest(content: Any) -> str:
    """SHA-256 over canonical JSON, in hex; raises `SignatureError` for what has none, such as NaN."""
    try:
        return hashlib.sha256(canonical(content)).hexdigest()
    except (ValueError, TypeError) as error:
        raise SignatureError("an answer with a number that is not finite, or of an unknown type") from error


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
