"""A release that only named sites can open: the adapter encrypted under a key of its own, that key to each site's.

sealed.json      the content key, by HPKE (RFC 9180: DHKEM(P-384), HKDF-SHA384, AES-256-GCM) to each site's key
adapter.sealed   the adapter, by AES-256-GCM in segments whose nonces count up and mark the last one, so that none can
                 be reordered, repeated or cut off (the STREAM construction, ePrint 2015/189)

Both are bound to the manifest by its hash. Manifest, card and signature stay in the clear.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from ld_common.core.atomic_files import file_digest, write_bytes
from ld_common.core.errors import ConfigError, ReleaseError
from ld_common.protocol.keys import DOMAIN, PrivateKey, PublicKey, canonical
from ld_common.protocol.site_name import check_site_name
from ld_common.release.release import ADAPTER, SEALED
from ld_common.release.signature import manifest_digest

ENVELOPE = "sealed.json"
FORMAT = 1
SEGMENT, TAG = 1 << 20, 16
KEY_BYTES = 32


@dataclass(frozen=True)
class Envelope:
    """Who can open a sealed adapter, and which file that is."""

    recipients: dict[str, str]
    """Site -> content key encrypted to it, base64."""
    sha256: str
    """Of `adapter.sealed`, hex."""


def seal_release(folder: Path, manifest: dict[str, Any], recipients: Mapping[str, PublicKey]) -> None:
    """Replace a folder's adapter by one that only `recipients` (site -> its key) can open.

    Raises:
        ReleaseError: nobody to seal to, or a key that is not on P-384.
    """
    if not recipients:
        raise ReleaseError("nobody is named who could open the release")
    key, sealed = AESGCM.generate_key(bit_length=8 * KEY_BYTES), {}
    for site, public in sorted(recipients.items()):
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise ReleaseError(f"the key of '{site}' is not on NIST P-384: nothing can be encrypted to it")
        sealed[site] = base64.b64encode(_suite().encrypt(key, public, _info(site, manifest))).decode()
    with (folder / ADAPTER).open("rb") as source, (folder / SEALED).open("wb") as target:
        for index, last, segment in _segments(source, SEGMENT):
            target.write(AESGCM(key).encrypt(_nonce(index, last), segment, _binding(manifest)))
        target.flush()
        os.fsync(target.fileno())
    content = {"format": FORMAT, "recipients": sealed, "sha256": file_digest(folder / SEALED)}
    write_bytes(folder / ENVELOPE, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
    (folder / ADAPTER).unlink()


def open_release(folder: Path, manifest: dict[str, Any], site: str, key: PrivateKey) -> None:
    """Put the adapter of a sealed folder back in its place, to be checked against the manifest by the caller.

    Raises:
        ReleaseError: sealed to others, altered, or of another manifest.
    """
    envelope = read_envelope((folder / ENVELOPE).read_bytes())
    content_key = _content_key(envelope, manifest, site, key)
    partial = folder / f"{ADAPTER}.part"
    try:
        with (folder / SEALED).open("rb") as source, partial.open("wb") as target:
            for index, last, segment in _segments(source, SEGMENT + TAG):
                target.write(AESGCM(content_key).decrypt(_nonce(index, last), segment, _binding(manifest)))
            target.flush()
            os.fsync(target.fileno())
    except InvalidTag as error:
        partial.unlink(missing_ok=True)
        raise ReleaseError("the encrypted adapter was altered, or belongs to another release: pull it again") from error
    partial.replace(folder / ADAPTER)
    (folder / SEALED).unlink()
    (folder / ENVELOPE).unlink()


def read_envelope(content: bytes) -> Envelope:
    """`sealed.json`; raises `ReleaseError`."""
    try:
        fields = json.loads(content)
        if fields["format"] != FORMAT:
            raise ReleaseError(f"{ENVELOPE} is not of format {FORMAT}: use the software that wrote it")
        recipients = {str(site): str(sealed) for site, sealed in fields["recipients"].items()}
        for site in recipients:
            check_site_name(site)
        return Envelope(recipients, str(fields["sha256"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise ReleaseError(f"{ENVELOPE} cannot be read: pull the release again") from error


def check_recipient(envelope: Envelope, site: str) -> None:
    """Refuse a release that is sealed to others; raises `ReleaseError`."""
    if site not in envelope.recipients:
        raise ReleaseError(
            f"the release is encrypted to {', '.join(sorted(envelope.recipients))} and not to '{site}': ask the study"
        )


def _content_key(envelope: Envelope, manifest: dict[str, Any], site: str, key: PrivateKey) -> bytes:
    check_recipient(envelope, site)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ReleaseError("the site's key is not on NIST P-384: nothing can be encrypted to it")
    try:
        raw = base64.b64decode(envelope.recipients[site], validate=True)
        opened = _suite().decrypt(raw, key, _info(site, manifest))
    except (InvalidTag, ValueError) as error:
        raise ReleaseError(
            f"the release does not open with the key of '{site}': it was encrypted to an earlier one, or altered"
        ) from error
    if len(opened) != KEY_BYTES:
        raise ReleaseError(f"{ENVELOPE} holds a key of the wrong length: pull the release again")
    return opened


def _segments(stream: Any, size: int) -> Iterator[tuple[int, bool, bytes]]:
    """A file in parts of `size` bytes: number, whether it is the last one, content."""
    index, part = 0, stream.read(size)
    while True:
        following = stream.read(size)
        yield index, not following, part
        if not following:
            return
        index, part = index + 1, following


def _nonce(index: int, last: bool) -> bytes:
    return index.to_bytes(11, "big") + bytes([last])


def _binding(manifest: dict[str, Any]) -> bytes:
    return DOMAIN + b"sealed-adapter\0" + manifest_digest(manifest)


def _info(site: str, manifest: dict[str, Any]) -> bytes:
    return DOMAIN + b"sealed-key\0" + canonical({"site": site, "manifest": manifest_digest(manifest).hex()})


def _suite() -> Suite:
    return Suite(KEM.P384, KDF.HKDF_SHA384, AEAD.AES_256_GCM)
