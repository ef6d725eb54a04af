"""The keys by which deployed sites know each other in secure aggregation, and what they sign with them.

A server that invents sites, or swaps a site's keys for its own, could open the sum down to one site. So each site signs
its keys of a round and each share that it deals, and checks the others' signatures against the keys that its data
manager approved with the study.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ld_common.core.errors import FederationError, SignatureError
from ld_common.protocol.keys import PrivateKey, PublicKey, Purpose, sign, verify
from ld_common.protocol.secagg.messages import KeyOffer, Roster, SecaggSetting


@dataclass(frozen=True)
class Peers:
    """The signing keys of a study's sites, by name."""

    keys: Mapping[str, PublicKey]

    def check_offer(self, setting: SecaggSetting, site: str, offer: KeyOffer) -> None:
        """Raise `FederationError` unless the site signed these keys for this round."""
        self._check(site, Purpose.SECURE_KEYS, _offered(setting, site, offer), offer.signature)

    def check_roster(self, setting: SecaggSetting, roster: Roster) -> None:
        """Raise `FederationError` unless each site of the roster is known and signed its keys."""
        rows = zip(roster.sealing_keys, roster.masking_keys, roster.signatures, strict=True)
        for site, row in zip(roster.sites, rows, strict=True):
            self.check_offer(setting, site, KeyOffer(*row))

    def check_share(self, session: bytes, dealer: str, recipient: str, sealed: bytes, signature: str) -> None:
        """Raise `FederationError` unless the dealer signed this sealed share."""
        self._check(dealer, Purpose.SECURE_SHARE, _dealt(session, dealer, recipient, sealed), signature)

    def _check(self, site: str, purpose: Purpose, content: Any, signature: str) -> None:
        key = self.keys.get(site)
        if key is None:
            raise FederationError(f"'{site}' is not one of the sites whose keys were approved: refused")
        try:
            verify(key, purpose, content, signature)
        except SignatureError as error:
            raise FederationError(f"a message that '{site}' did not sign stands in its name: refused") from error


@dataclass(frozen=True)
class Identity(Peers):
    """A site's own signing key, beside those of all sites."""

    own: PrivateKey

    def sign_offer(self, setting: SecaggSetting, site: str, offer: KeyOffer) -> str:
        """Signature of a site's keys of a round."""
        return sign(self.own, Purpose.SECURE_KEYS, _offered(setting, site, offer))

    def sign_share(self, session: bytes, dealer: str, recipient: str, sealed: bytes) -> str:
        """Signature of a sealed share."""
        return sign(self.own, Purpose.SECURE_SHARE, _dealt(session, dealer, recipient, sealed))


def _offered(setting: SecaggSetting, site: str, offer: KeyOffer) -> dict[str, str]:
    keys = {"sealing": offer.sealing_key.hex(), "masking": offer.masking_key.hex()}
    return {"setting": setting.digest().hex(), "site": site, **keys}


def _dealt(session: bytes, dealer: str, recipient: str, sealed: bytes) -> dict[str, str]:
    digest = hashlib.sha256(sealed).hexdigest()
    return {"session": session.hex(), "dealer": dealer, "recipient": recipient, "sealed": digest}
