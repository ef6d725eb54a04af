"""Keys, and signatures over canonical JSON with domain separation.

Studies and sites sign with Ed25519. Keys on NIST P-384 authenticate nodes and TLS, and decrypt releases
(`ld_common.protocol.site_keys`). Public keys travel as one line of OpenSSH's format.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from enum import Enum
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ld_common.core.atomic_files import write_new
from ld_common.core.errors import SignatureError

PrivateKey = Ed25519PrivateKey | ec.EllipticCurvePrivateKey
PublicKey = Ed25519PublicKey | ec.EllipticCurvePublicKey
DOMAIN = b"latent-drift-federation/1/"
MAX_LINE = 200
"""Length of a name or an address in signed content."""


class Purpose(Enum):
    """Purpose of a signature; a signature for another purpose is invalid."""

    KIT = "kit"
    RELEASE = "release"
    RESULT = "result"
    AUDIT_HEAD = "audit-head"
    ENROLMENT = "enrolment"
    SECURE_KEYS = "secure-keys"
    SECURE_SHARE = "secure-share"


def canonical(content: Any) -> bytes:
    """JSON with sorted keys and no spaces, UTF-8; raises `ValueError` for NaN and infinite numbers."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def is_digest(value: object) -> bool:
    """Whether this is a SHA-256 as 64 lower-case hex digits."""
    return isinstance(value, str) and bool(re.fullmatch(r"[0-9a-f]{64}", value))


def is_line(value: object) -> bool:
    """Whether this is one line of 1 to `MAX_LINE` printable characters, safe to print and to log."""
    return isinstance(value, str) and 0 < len(value) <= MAX_LINE and value.isprintable()


def sign(key: PrivateKey, purpose: Purpose, content: Any) -> str:
    """A signature over canonical JSON, base64: Ed25519, or ECDSA with SHA-384."""
    message = _message(purpose, content)
    signature = key.sign(message) if isinstance(key, Ed25519PrivateKey) else key.sign(message, _ecdsa())
    return base64.b64encode(signature).decode()


def verify(key: PublicKey, purpose: Purpose, content: Any, signature: str) -> None:
    """Verify a signature of `sign`; raises `SignatureError`."""
    try:
        raw = base64.b64decode(signature, validate=True)
        if isinstance(key, Ed25519PublicKey):
            key.verify(raw, _message(purpose, content))
        else:
            key.verify(raw, _message(purpose, content), _ecdsa())
    except (InvalidSignature, binascii.Error, ValueError, TypeError, RecursionError) as error:
        raise SignatureError(
            f"the signature of this {purpose.value} does not hold: it was altered, or another key signed it"
        ) from error


def new_signing_key() -> Ed25519PrivateKey:
    """Generate the key with which a study or a site signs."""
    return Ed25519PrivateKey.generate()


def new_elliptic_key() -> ec.EllipticCurvePrivateKey:
    """Generate a key on NIST P-384."""
    return ec.generate_private_key(ec.SECP384R1())


def private_pem(key: PrivateKey) -> bytes:
    """A private key as TLS libraries read it: PKCS #8, PEM, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def write_private_key(path: Path, key: PrivateKey, openssh: bool = False) -> None:
    """Write a new key file with mode 0600, as `private_pem` or in OpenSSH's format, which Flower's nodes need.

    Raises:
        SignatureError: the file exists or cannot be written.
    """
    content = private_pem(key)
    if openssh:
        content = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
    try:
        write_new(path, content)
    except OSError as error:
        raise SignatureError(f"cannot write the key '{path}': {error.strerror or error}") from error


def read_private_key(path: Path) -> PrivateKey:
    """Read a key file of `write_private_key`; raises `SignatureError`, also if others may read it."""
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
        raise SignatureError(f"'{path}' is not a key of this software: restore it from a backup") from error
    if not isinstance(key, Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
        raise SignatureError(f"'{path}' is neither an Ed25519 nor an elliptic-curve key")
    return key


def read_elliptic_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a key on an elliptic curve; raises `SignatureError` for one that signs."""
    key = read_private_key(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SignatureError(f"'{path}' is an Ed25519 key, not one on NIST P-384: restore it from a backup")
    return key


def read_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read the key with which a study or a site signs; raises `SignatureError` for any other."""
    key = read_private_key(path)
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"'{path}' is not an Ed25519 key: restore it from a backup")
    return key


def public_line(key: PublicKey) -> str:
    """A public key as one line of OpenSSH's format, without a comment."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def read_public_line(line: str) -> PublicKey:
    """The key of `public_line`; raises `SignatureError` for anything but Ed25519 and P-384."""
    try:
        key = serialization.load_ssh_public_key(line.strip().encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError("not a public key: give the whole printed line, ssh-ed25519 ... or ecdsa-...") from error
    if isinstance(key, Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1):
        return key
    raise SignatureError("this public key is neither Ed25519 nor on NIST P-384")


def fingerprint(key: PublicKey) -> str:
    """SHA-256 of a key as `ssh-keygen -l` prints it, for people to compare by telephone."""
    blob = base64.b64decode(public_line(key).split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def _message(purpose: Purpose, content: Any) -> bytes:
    return DOMAIN + purpose.value.encode() + b"\0" + canonical(content)


def _ecdsa() -> ec.ECDSA:
    return ec.ECDSA(hashes.SHA384())
