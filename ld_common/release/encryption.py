"""Releases that only named sites can open: weights encrypted under a random key, that key encrypted to each site.

    sealed.json     the content key, by HPKE (RFC 9180: DHKEM(P-384), HKDF-SHA384, AES-256-GCM) to each site's key
    NAME.sealed     each `.safetensors` file NAME, under its own key derived from the content key (HKDF-SHA384), by
                    AES-256-GCM in segments. Nonces count up and mark the last segment, so segments cannot be reordered,
                    repeated or cut off (the STREAM construction, ePrint 2015/189)

Both are bound to the manifest by its hash. Manifest, card, configs and signature stay in the clear.
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
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ld_common.core.atomic_files import file_digest, write_bytes
from ld_common.core.errors import ConfigError, ReleaseError
from ld_common.core.strict_json import read_json, read_limited
from ld_common.protocol.keys import DOMAIN, PrivateKey, PublicKey, canonical
from ld_common.protocol.site_name import check_site_name
from ld_common.release.release import ENVELOPE, SEALED_SUFFIX, file_names
from ld_common.release.signature import manifest_digest

FORMAT = 2
SEGMENT, TAG = 1 << 20, 16
KEY_BYTES = 32


@dataclass(frozen=True)
class Envelope:
    """Who can open a sealed release, and its encrypted files."""

    recipients: dict[str, str]
    """Site -> content key encrypted to it, base64."""
    sha256: dict[str, str]
    """Encrypted file -> its SHA-256, hex."""


def seal_release(folder: Path, manifest: dict[str, Any], recipients: Mapping[str, PublicKey]) -> None:
    """Encrypt the weights and the drift of a release folder in place, to `recipients` (site -> its key).

    Raises:
        ReleaseError: no recipient, or a key that is not on P-384.
    """
    if not recipients:
        raise ReleaseError("no recipient is named who could open the release")
    key, encrypted_keys = AESGCM.generate_key(bit_length=8 * KEY_BYTES), {}
    for site, public in sorted(recipients.items()):
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise ReleaseError(f"the key of '{site}' is not on NIST P-384: nothing can be encrypted to it")
        encrypted_keys[site] = base64.b64encode(_suite().encrypt(key, public, _info(site, manifest))).decode()
    secret = sealed_names(manifest)
    for name in secret:
        cipher = AESGCM(_file_key(key, name))
        with (folder / name).open("rb") as source, (folder / (name + SEALED_SUFFIX)).open("wb") as target:
            for index, last, segment in _segments(source, SEGMENT):
                target.write(cipher.encrypt(_nonce(index, last), segment, _binding(manifest)))
            target.flush()
            os.fsync(target.fileno())
    digests = {name + SEALED_SUFFIX: file_digest(folder / (name + SEALED_SUFFIX)) for name in secret}
    content = {"format": FORMAT, "recipients": encrypted_keys, "sha256": digests}
    write_bytes(folder / ENVELOPE, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
    for name in secret:
        (folder / name).unlink()


def sealed_names(manifest: dict[str, Any]) -> list[str]:
    """The files of a release that encryption covers: all `.safetensors` files."""
    return [name for name in file_names(manifest) if name.endswith(".safetensors")]


def open_release(folder: Path, manifest: dict[str, Any], site: str, key: PrivateKey) -> None:
    """Decrypt the files of a sealed folder in place; the caller checks them against the manifest.

    Raises:
        ReleaseError: sealed to other sites, altered, or of another manifest.
    """
    try:
        envelope = read_envelope(read_limited(folder / ENVELOPE))
    except ValueError as error:
        raise ReleaseError(f"{ENVELOPE} cannot be read ({error}): pull the release again") from error
    content_key = _content_key(envelope, manifest, site, key)
    for name in sealed_names(manifest):
        partial, cipher = folder / f"{name}.part", AESGCM(_file_key(content_key, name))
        try:
            with (folder / (name + SEALED_SUFFIX)).open("rb") as source, partial.open("wb") as target:
                for index, last, segment in _segments(source, SEGMENT + TAG):
                    target.write(cipher.decrypt(_nonce(index, last), segment, _binding(manifest)))
                target.flush()
                os.fsync(target.fileno())
        except InvalidTag as error:
            partial.unlink(missing_ok=True)
            raise ReleaseError("the encrypted adapter was altered, or is of another release: pull it again") from error
        partial.replace(folder / name)
        (folder / (name + SEALED_SUFFIX)).unlink()
    (folder / ENVELOPE).unlink()


def read_envelope(content: bytes) -> Envelope:
    """Parse `sealed.json`; raises `ReleaseError`."""
    try:
        fields = read_json(content)
        if fields["format"] != FORMAT:
            raise ReleaseError(
                f"{ENVELOPE} is of format {fields['format']}, not {FORMAT}: use the version that wrote it"
            )
        recipients = {str(site): str(encrypted) for site, encrypted in fields["recipients"].items()}
        for site in recipients:
            check_site_name(site)
        return Envelope(recipients, {str(name): str(digest) for name, digest in fields["sha256"].items()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise ReleaseError(f"{ENVELOPE} cannot be read: pull the release again") from error


def check_recipient(envelope: Envelope, site: str) -> None:
    """Check that a release is sealed to this site; raises `ReleaseError`."""
    if site not in envelope.recipients:
        raise ReleaseError(
            f"the release is encrypted to {', '.join(sorted(envelope.recipients))}, not to '{site}': ask the study"
        )


def _content_key(envelope: Envelope, manifest: dict[str, Any], site: str, key: PrivateKey) -> bytes:
    check_recipient(envelope, site)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ReleaseError("the site's key is not on NIST P-384: nothing can be encrypted to it")
    try:
        raw = base64.b64decode(envelope.recipients[site], validate=True)
        content_key = _suite().decrypt(raw, key, _info(site, manifest))
    except (InvalidTag, ValueError) as error:
        raise ReleaseError(
            f"the key of '{site}' does not open the release: it was encrypted to an earlier key, or altered"
        ) from error
    if len(content_key) != KEY_BYTES:
        raise ReleaseError(f"{ENVELOPE} holds a key of the wrong length: pull the release again")
    return content_key


def _file_key(content_key: bytes, name: str) -> bytes:
    """Each file has a key of its own, because nonces start at 0 in each."""
    return HKDF(SHA384(), KEY_BYTES, salt=None, info=DOMAIN + b"sealed-file\0" + name.encode()).derive(content_key)


def _segments(stream: Any, size: int) -> Iterator[tuple[int, bool, bytes]]:
    """Yield a file in segments of `size` bytes: number, whether it is the last one, content."""
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
