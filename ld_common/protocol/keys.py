"""Keys, and signatures over canonical JSON that cannot be taken for one another's.

A study signs kits and releases with Ed25519. A site has one key, on NIST P-384 as Flower wants it: with it, its node
proves itself, its certificate for the release service is made, and the heads of its audit log are signed. Public keys
travel as one line of OpenSSH's format.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
from enum import Enum
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ld_common.core.errors import SignatureError

PrivateKey = Ed25519PrivateKey | ec.EllipticCurvePrivateKey
PublicKey = Ed25519PublicKey | ec.EllipticCurvePublicKey
DOMAIN = b"latent-drift-federation/1/"
MAX_LINE = 200
"""Characters of a name or an address in what is signed."""


class Purpose(Enum):
    """What a signature is for; one made for another purpose does not hold."""

    KIT = "kit"
    RELEASE = "release"
    RESULT = "result"
    AUDIT_HEAD = "audit-head"


def canonical(content: Any) -> bytes:
    """JSON with sorted keys and no spaces, UTF-8; raises `ValueError` for NaN and infinite numbers."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def is_digest(value: object) -> bool:
    """Whether this is a SHA-256 as we write it: 64 digits of lower-case hex."""
    return isinstance(value, str) and bool(re.fullmatch(r"[0-9a-f]{64}", value))


def is_line(value: object) -> bool:
    """Whether this is one line of 1 to `MAX_LINE` printable characters, safe to show and to write into a record."""
    return isinstance(value, str) and 0 < len(value) <= MAX_LINE and value.isprintable()


def sign(key: PrivateKey, purpose: Purpose, content: Any) -> str:
    """A signature over canonical JSON, base64: Ed25519, or ECDSA with SHA-384."""
    message = _message(purpose, content)
    signature = key.sign(message) if isinstance(key, Ed25519PrivateKey) else key.sign(message, _ecdsa())
    return base64.b64encode(signature).decode()


def verify(key: PublicKey, purpose: Purpose, content: Any, signature: str) -> None:
    """Check a signature of `sign`; raises `SignatureError`."""
    try:
        raw = base64.b64decode(signature, validate=True)
        if isinstance(key, Ed25519PublicKey):
            key.verify(raw, _message(purpose, content))
        else:
            key.verify(raw, _message(purpose, content), _ecdsa())
    except (InvalidSignature, binascii.Error, ValueError, TypeError, RecursionError) as error:
        raise SignatureError(
            f"the signature of this {purpose.value} does not hold: it was altered, or signed by another"
        ) from error


def new_study_key() -> Ed25519PrivateKey:
    """A key that signs kits and releases."""
    return Ed25519PrivateKey.generate()


def new_site_key() -> ec.EllipticCurvePrivateKey:
    """A site's key."""
    return ec.generate_private_key(ec.SECP384R1())


def private_pem(key: PrivateKey) -> bytes:
    """A private key as TLS libraries read it: PKCS #8, PEM, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def write_private_key(path: Path, key: PrivateKey, openssh: bool = False) -> None:
    """Write a new key file with mode 0600, as `private_pem` or in OpenSSH's format, which Flower's nodes want.

    Raises:
        SignatureError: there is one, or it cannot be written.
    """
    content = private_pem(key)
    if openssh:
        content = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(content)
    except OSError as error:
        raise SignatureError(f"cannot write the key '{path}': {error.strerror or error}") from error


def read_private_key(path: Path) -> PrivateKey:
    """A key file of `write_private_key`; raises `SignatureError`, also for one that others may read."""
    try:
        content, mode = path.read_bytes(), path.stat().st_mode & 0o777
    except OSError as error:
        raise SignatureError(f"cannot read the key '{path}': {error.strerror or error}") from error
    if mode & 0o077:
        raise SignatureError(f"others may read the key '{path}' (mode {mode:o}): run chmod 600 on it")
    try:
        load = serialization.load_ssh_private_key if b"BEGIN OPENSSH" in content else serialization.load_pem_private_key
        key = load(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"'{path}' is no key of this software: restore it from a backup") from error
    if not isinstance(key, Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
        raise SignatureError(f"'{path}' is neither an Ed25519 nor an elliptic-curve key")
    return key


def read_elliptic_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The same for a site's, a server's or an authority's key; raises `SignatureError` for a study's."""
    key = read_private_key(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SignatureError(f"'{path}' is a study's key, not one on an elliptic curve: restore it from a backup")
    return key


def read_study_key(path: Path) -> Ed25519PrivateKey:
    """The same for a study's key; raises `SignatureError` for another one."""
    key = read_private_key(path)
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"'{path}' is no study's key: restore it from a backup")
    return key


def public_line(key: PublicKey) -> str:
    """A public key as one line of OpenSSH's format, without a comment."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def read_public_line(line: str) -> PublicKey:
    """The key of `public_line`; raises `SignatureError` for anything but Ed25519 and P-384."""
    try:
        key = serialization.load_ssh_public_key(line.strip().encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(
            "this is no public key: give the whole line that was printed, ssh-ed25519 or ecdsa-..."
        ) from error
    if isinstance(key, Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1):
        return key
    raise SignatureError("this public key is neither Ed25519 nor on NIST P-384")


def fingerprint(key: PublicKey) -> str:
    """What people compare over the telephone: SHA-256 of the key, as ssh-keygen -l shows it."""
    blob = base64.b64decode(public_line(key).split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def _message(purpose: Purpose, content: Any) -> bytes:
    return DOMAIN + purpose.value.encode() + b"\0" + canonical(content)


def _ecdsa() -> ec.ECDSA:
    return ec.ECDSA(hashes.SHA384())
