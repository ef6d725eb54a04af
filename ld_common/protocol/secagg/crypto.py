"""The cryptography of secure aggregation: keys for one purpose, masks, sealed shares, marks of secrets.

Keys come from X25519 and HKDF-SHA256, masks are AES-256-CTR key streams, shares are sealed with AES-256-GCM. A mask's
key serves once, so its counter starts at zero; a sealed share has a random nonce. Shares are sealed under the pair's
agreed key, as Bonawitz et al. have it, and not with HPKE, whose base mode would let anyone write a share in another
site's name.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from ld_common.core.errors import FederationError

DOMAIN = "latent-drift-federation/secure-aggregation/1"
SECRET_BYTES = 16
"""Length of a shared secret and of each of its shares: one element of GF(2^128)."""
DIGEST_BYTES = 32
NONCE_BYTES = 12
SEALED_BYTES = NONCE_BYTES + 2 * SECRET_BYTES + 16
"""A nonce, a seed's share, a key's share, and the tag of AES-GCM."""


def digest(*parts: str | bytes) -> bytes:
    """SHA-256 of the parts and their lengths: no two lists of parts give the same."""
    whole = hashlib.sha256(DOMAIN.encode())
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        whole.update(len(content).to_bytes(8, "little") + content)
    return whole.digest()


def derive(secret: bytes, *purpose: str | bytes) -> bytes:
    """A key of 32 bytes for one purpose."""
    return HKDF(SHA256(), length=32, salt=None, info=digest(*purpose)).derive(secret)


def masking_key(secret: bytes, setting: bytes, site: str) -> X25519PrivateKey:
    """The private key of a site's masks towards others, from the secret that is dealt in its place."""
    return X25519PrivateKey.from_private_bytes(derive(secret, "masking key", setting, site))


def agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """The secret that two sites share.

    Raises:
        FederationError: `public` is no key, or one of the few with which anyone agrees on zero.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise FederationError("a public key is not a usable X25519 key: its site must make another") from error


def pair_mask(
    private: X25519PrivateKey, public: bytes, crowd: bytes, site: str, peer: str, length: int
) -> NDArray[np.uint32]:
    """What `site` adds because of `peer`; what `peer` adds because of `site` is its negative modulo 2**32.

    Args:
        private: the masking key of either.
        public: the masking key of the other.
        crowd: digest of session and of all sites that mask, without agreement on which nothing cancels.
        site: who adds it.
        peer: because of whom.
        length: how many numbers.
    """
    first, second = sorted((site, peer))
    mask = expand(derive(agree(private, public), "pair mask", crowd, first, second), length)
    return mask if site == first else np.negative(mask)


def self_mask(seed: bytes, crowd: bytes, site: str, length: int) -> NDArray[np.uint32]:
    """What a site adds on its own account."""
    return expand(derive(seed, "self mask", crowd, site), length)


def expand(key: bytes, length: int) -> NDArray[np.uint32]:
    """The first numbers of a key's stream, uniform over 32 bits; the key must serve no other purpose."""
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * length))
    return np.frombuffer(stream, dtype="<u4").astype(np.uint32)


def crowd_digest(session: bytes, sites: Sequence[str]) -> bytes:
    """Digest of a session and all sites that mask in it."""
    return digest("crowd", session, *sites)


def seal(secret: bytes, session: bytes, dealer: str, recipient: str, shares: bytes) -> bytes:
    """Encrypt what `dealer` deals to `recipient` under their agreed secret, with a random nonce in front."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + AESGCM(derive(secret, "seal", session, dealer, recipient)).encrypt(nonce, shares, None)


def unseal(secret: bytes, session: bytes, dealer: str, recipient: str, sealed: bytes) -> bytes | None:
    """Undo `seal`; None when it was altered, or is of another round, dealer or recipient."""
    try:
        cipher = AESGCM(derive(secret, "seal", session, dealer, recipient))
        return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], None)
    except InvalidTag:
        return None


def mark(session: bytes, kind: str, dealer: str, recipient: str, secret: bytes) -> bytes:
    """A digest by which a secret of 128 random bits is known again and from which it cannot be found."""
    return digest("mark", session, kind, dealer, recipient, secret)
