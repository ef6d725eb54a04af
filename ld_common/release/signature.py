"""Signatures of releases: Ed25519 over the manifest, which lists the hash of every other file.

`manifest.sig` holds the signer's public key and the signature. The key in it only identifies the signer; readers decide
whether they trust it (`ld_common.release.trusted_keys`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import ReleaseError, SignatureError
from ld_common.core.strict_json import read_json
from ld_common.protocol.keys import (
    PublicKey,
    Purpose,
    canonical,
    fingerprint,
    public_line,
    read_public_line,
    sign,
    verify,
)
from ld_common.release.release import MANIFEST, SIGNATURE, check_files, read_manifest

FORMAT = 1
MAX_SIGNATURE_BYTES = 10_000


@dataclass(frozen=True)
class ReleaseSignature:
    """The content of `manifest.sig`, unverified until `check_manifest`."""

    key: Ed25519PublicKey
    signature: str


def sign_release(folder: Path, key: Ed25519PrivateKey) -> None:
    """Check the files of a release folder and sign its manifest; raises `ReleaseError`."""
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    try:
        signature = sign(key, Purpose.RELEASE, manifest)
    except ValueError as error:
        raise ReleaseError(f"'{folder / MANIFEST}' holds numbers that are not finite: it cannot be signed") from error
    content = {"format": FORMAT, "public_key": public_line(key.public_key()), "signature": signature}
    write_bytes(folder / SIGNATURE, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def read_signature(folder: Path) -> ReleaseSignature | None:
    """A release's signature, unverified, or None without one; raises `SignatureError` if it cannot be read."""
    try:
        with (folder / SIGNATURE).open("rb") as stream:
            return parse_signature(stream.read(MAX_SIGNATURE_BYTES + 1))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SignatureError(f"cannot read '{folder / SIGNATURE}': {error.strerror or error}") from error


def parse_signature(content: bytes) -> ReleaseSignature:
    """The content of `manifest.sig`; raises `SignatureError`."""
    try:
        if len(content) > MAX_SIGNATURE_BYTES:
            raise ValueError("too long")
        fields = read_json(content)
        current = fields["format"] == FORMAT
        line, signature = str(fields["public_key"]), str(fields["signature"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SignatureError(f"{SIGNATURE} is not a signature of a release: copy the release again") from error
    if not current:
        raise SignatureError(f"{SIGNATURE} is not of format {FORMAT}: use the software that wrote it")
    key = read_public_line(line)
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(f"{SIGNATURE} holds the key of a site, releases are signed with a study's: ask the study")
    return ReleaseSignature(key, signature)


def check_manifest(manifest: dict[str, Any], signature: ReleaseSignature, trusted: Sequence[PublicKey]) -> None:
    """Verify that a trusted key signed this manifest; raises `SignatureError`."""
    lines = {public_line(key) for key in trusted}
    if public_line(signature.key) not in lines:
        raise SignatureError(f"the release is signed by another key, {fingerprint(signature.key)}")
    verify(signature.key, Purpose.RELEASE, manifest, signature.signature)


def check_release(folder: Path, trusted: Sequence[PublicKey]) -> dict[str, Any]:
    """The manifest of a folder, after verifying its signature by a trusted key and the hash of every file.

    Raises:
        SignatureError: unsigned, signed by another key, or altered.
        ReleaseError: no release, or a file that differs from the manifest.
    """
    manifest, signature = read_manifest(folder), read_signature(folder)
    if signature is None:
        raise SignatureError(f"'{folder}' is not signed: ask the study for a signed release")
    check_manifest(manifest, signature, trusted)
    check_files(folder, manifest)
    return manifest


def manifest_digest(manifest: dict[str, Any]) -> bytes:
    """SHA-256 of a manifest's canonical form; raises `ReleaseError` for numbers that are not finite."""
    try:
        return hashlib.sha256(canonical(manifest)).digest()
    except ValueError as error:
        raise ReleaseError("the manifest holds numbers that are not finite") from error


def release_name(manifest: dict[str, Any]) -> str:
    """`<study>-<number>`, the name of an issued release; raises `ReleaseError` for one that was not issued."""
    try:
        study, number = str(manifest["study"]["name"]), int(manifest["release"]["number"])
    except (KeyError, TypeError, ValueError) as error:
        raise ReleaseError("this release was not issued and has no number: use ld-server release") from error
    return f"{plain_name(study)}-{number}"


def plain_name(study: str) -> str:
    """A study's name for use in file names: letters, digits and `_.-`, starting with a letter or digit."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", study)[:100].strip("._-") or "study"
