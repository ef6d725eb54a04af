"""A site's four keys, each for one use, and the line by which a site sends its public keys to the study.

node         login of the site's node at Flower's SuperLink; NIST P-384, as Flower requires
certificate  TLS client certificate for the release service; NIST P-384
signing      results, heads of the audit log, messages of secure aggregation; Ed25519. People compare its fingerprint
sealing      decryption of releases; NIST P-384, for HPKE
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import asdict, dataclass
from typing import cast

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ld_common.core.errors import SignatureError
from ld_common.core.strict_json import read_json
from ld_common.protocol.keys import (
    PrivateKey,
    Purpose,
    canonical,
    fingerprint,
    new_elliptic_key,
    new_signing_key,
    public_line,
    read_public_line,
    sign,
    verify,
)

LINE_START = "latent-drift-site-1"
MAX_ENROLMENT = 4000
"""Characters of an enrolment line."""


@dataclass(frozen=True)
class SiteKeys:
    """A site's public keys, each one line of OpenSSH's format.

    Raises:
        SignatureError: a line holds no key, a key of another kind, or a key that stands twice.
    """

    node: str
    certificate: str
    signing: str
    sealing: str

    def __post_init__(self) -> None:
        lines = asdict(self)
        for use, line in lines.items():
            key = read_public_line(line) if isinstance(line, str) else None
            kind = Ed25519PublicKey if use == "signing" else ec.EllipticCurvePublicKey
            if key is None or not isinstance(key, kind) or public_line(key) != line:
                raise SignatureError(f"the site's {use} key is not one that ld-client init makes")
        if len(set(lines.values())) < len(lines):
            raise SignatureError("two of the site's keys are the same: each use has its own")

    @property
    def node_key(self) -> ec.EllipticCurvePublicKey:
        """The key of the site's node."""
        return _elliptic(self.node)

    @property
    def certificate_key(self) -> ec.EllipticCurvePublicKey:
        """The key that the site's certificate is issued for."""
        return _elliptic(self.certificate)

    @property
    def signing_key(self) -> Ed25519PublicKey:
        """The key of the site's signatures."""
        return cast(Ed25519PublicKey, read_public_line(self.signing))

    @property
    def sealing_key(self) -> ec.EllipticCurvePublicKey:
        """The key that releases are encrypted to."""
        return _elliptic(self.sealing)

    @property
    def fingerprint(self) -> str:
        """The signing key's, which stands for the site: it signs the other three."""
        return fingerprint(self.signing_key)


def new_site_keys() -> dict[str, PrivateKey]:
    """Generate a site's private keys, by their use."""
    keys: dict[str, PrivateKey] = {use: new_elliptic_key() for use in ("node", "certificate", "sealing")}
    return {**keys, "signing": new_signing_key()}


def public_keys(private: dict[str, PrivateKey]) -> SiteKeys:
    """The public keys of `new_site_keys`."""
    return SiteKeys(**{use: public_line(key.public_key()) for use, key in private.items()})


def enrolment_line(site: str, keys: SiteKeys, signing: Ed25519PrivateKey) -> str:
    """The line that `ld-client enroll` prints: the site's name and its public keys, signed."""
    content = {"site": site, "keys": asdict(keys)}
    signed = {**content, "signature": sign(signing, Purpose.ENROLMENT, content)}
    return f"{LINE_START} {site} {base64.urlsafe_b64encode(canonical(signed)).decode()}"


def read_enrolment(line: str) -> tuple[str, SiteKeys]:
    """The site and the keys of `enrolment_line`; raises `SignatureError` for any other line."""
    words = line.split()
    if len(words) != 3 or words[0] != LINE_START or len(line) > MAX_ENROLMENT:
        raise SignatureError(f"not an enrolment: give the whole line that ld-client enroll printed, {LINE_START} ...")
    try:
        signed = read_json(base64.b64decode(words[2], altchars=b"-_", validate=True))
        content = {"site": signed["site"], "keys": signed["keys"]}
        keys = SiteKeys(**signed["keys"])
        if set(signed) != {*content, "signature"} or signed["site"] != words[1]:
            raise ValueError("other fields than an enrolment has")
    except (binascii.Error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SignatureError("the enrolment line was cut or altered: ask the site for it again") from error
    verify(keys.signing_key, Purpose.ENROLMENT, content, signed["signature"])
    return words[1], keys


def _elliptic(line: str) -> ec.EllipticCurvePublicKey:
    return cast(ec.EllipticCurvePublicKey, read_public_line(line))
