"""Pseudonyms for patients: keyed hashes under the store's key."""

from __future__ import annotations

import hashlib
import hmac


def pseudonym(key: bytes, patient: str) -> str:
    """The first 128 bits of the HMAC-SHA256 of a patient's identifier, in hex."""
    return hmac.new(key, patient.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[:32]
