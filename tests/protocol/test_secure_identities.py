"""A server that invents sites, swaps keys or writes shares, against sites that approved each other's keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ld_client.privacy.secagg import SiteState, begun, deal_shares, mask_update, offer_keys, open_shares, reveal_shares
from ld_common.core.errors import FederationError
from ld_common.protocol.keys import new_signing_key
from ld_common.protocol.secagg.identities import Identity, Peers
from ld_common.protocol.secagg.messages import (
    DealtShares,
    KeyOffer,
    Payload,
    Roster,
    RoutedShares,
    SecaggSetting,
    Stage,
    UnmaskRequest,
    pack,
    unpack,
)
from ld_server.secagg import SecureAggregation
from tests.support.secure_sites import Sites, check_sum, make_sites

NAMES = [f"s{place:02}" for place in range(4)]
PRIVATE = {name: new_signing_key() for name in NAMES}
PEERS = Peers({name: key.public_key() for name, key in PRIVATE.items()})
STRANGER = new_signing_key()


def identity(site: str, own: Ed25519PrivateKey | None = None) -> Identity:
    return Identity(PEERS.keys, own or PRIVATE[site])


@dataclass
class SigningSites(Sites):
    """Sites with keys, some of which a test replaces."""

    own: dict[str, Ed25519PrivateKey] = field(default_factory=dict)

    def answer(self, stage: Stage, site: str, request: object) -> object:
        state = SiteState.from_bytes(self.states[site]) if site in self.states else None
        who, answer = identity(site, self.own.get(site)), None
        if stage is Stage.KEYS:
            state, answer = offer_keys(site, unpack(SecaggSetting, request), identity=who)  # type: ignore[arg-type]
        elif stage is Stage.SHARES:
            state, answer = deal_shares(begun(state), unpack(Roster, request), who)  # type: ignore[arg-type]
        elif stage is Stage.VECTOR:
            routed = unpack(RoutedShares, request)  # type: ignore[arg-type]
            state = open_shares(begun(state), routed, self.setting.study, self.setting.round, who)
            state, answer, _ = mask_update(state, self.updates[site])
        else:
            state, answer = reveal_shares(begun(state), unpack(UnmaskRequest, request))  # type: ignore[arg-type]
        self.states[site] = state.to_bytes()
        return answer


def signing_sites() -> SigningSites:
    plain = make_sites(4)
    return SigningSites(plain.setting, plain.updates)


def aggregation(sites: Sites) -> SecureAggregation:
    return SecureAggregation(sites.setting, list(sites.updates), PEERS)


def roster_of(sites: SigningSites) -> tuple[SiteState, Roster]:
    """The first site after its offer, and the honest roster that it is due."""
    aggregation(sites).agree(sites.exchange)
    good = unpack(Roster, sites.requests[Stage.SHARES]["s00"])
    state, own = offer_keys("s00", sites.setting, identity=identity("s00"))
    replaced = replace(
        good,
        sealing_keys=[own.sealing_key, *good.sealing_keys[1:]],
        masking_keys=[own.masking_key, *good.masking_keys[1:]],
        signatures=[own.signature, *good.signatures[1:]],
    )
    return state, replaced


def test_sites_that_sign_give_the_same_sum() -> None:
    sites = signing_sites()
    server = aggregation(sites)
    server.collect(sites.exchange(Stage.VECTOR, server.agree(sites.exchange)))
    check_sum(server.unmask(sites.exchange), sites, NAMES)


def invented(site: str, setting: SecaggSetting, key: Ed25519PrivateKey) -> KeyOffer:
    """Keys of the server's own making in the name of a site."""
    return offer_keys(site, setting, identity=identity(site, key))[1]


def swapped(roster: Roster, place: int, site: str, offer: KeyOffer) -> Roster:
    lists = {name: list(getattr(roster, name)) for name in ("sites", "sealing_keys", "masking_keys", "signatures")}
    for name, value in zip(lists, (site, offer.sealing_key, offer.masking_key, offer.signature), strict=True):
        lists[name][place] = value
    return Roster(**lists)


ROSTERS: dict[str, Callable[[Roster, SecaggSetting], Roster]] = {
    "an invented site": lambda roster, setting: swapped(roster, 3, "s99", invented("s99", setting, STRANGER)),
    "two invented sites": lambda roster, setting: swapped(
        swapped(roster, 3, "s99", invented("s99", setting, STRANGER)), 2, "s98", invented("s98", setting, STRANGER)
    ),
    "the server's keys in a site's name": lambda roster, setting: swapped(
        roster, 1, "s01", invented("s01", setting, STRANGER)
    ),
    "another site's signature": lambda roster, setting: swapped(
        roster, 1, "s01", invented("s01", setting, PRIVATE["s02"])
    ),
    "keys that the site signed for another round": lambda roster, setting: swapped(
        roster, 1, "s01", invented("s01", replace(setting, round=setting.round + 1), PRIVATE["s01"])
    ),
    "keys that the site signed for another study": lambda roster, setting: swapped(
        roster, 1, "s01", invented("s01", replace(setting, study="other"), PRIVATE["s01"])
    ),
    "no signature": lambda roster, setting: swapped(
        roster, 1, "s01", replace(invented("s01", setting, STRANGER), signature="")
    ),
    "one key swapped under a good signature": lambda roster, setting: swapped(
        roster,
        1,
        "s01",
        KeyOffer(roster.sealing_keys[1], invented("s01", setting, STRANGER).masking_key, roster.signatures[1]),
    ),
}


@pytest.mark.attack
@pytest.mark.parametrize("attempt", ROSTERS)
def test_a_roster_with_a_site_or_a_key_that_nobody_approved_is_refused(attempt: str) -> None:
    sites = signing_sites()
    state, good = roster_of(sites)
    deal_shares(state, good, identity("s00"))
    roster = ROSTERS[attempt](good, sites.setting)
    order = sorted(range(len(roster.sites)), key=lambda place: roster.sites[place])
    lists = {name: [values[place] for place in order] for name, values in vars(roster).items()}
    with pytest.raises(FederationError, match="refused"):
        deal_shares(state, Roster(**lists), identity("s00"))


@pytest.mark.attack
@pytest.mark.parametrize("attempt", ["altered", "of another recipient", "without a signature"])
def test_a_share_that_its_dealer_did_not_sign_is_refused(attempt: str) -> None:
    sites = signing_sites()
    requests = aggregation(sites).agree(sites.exchange)
    state, routed = SiteState.from_bytes(sites.states["s00"]), unpack(RoutedShares, requests["s00"])
    open_shares(state, routed, "study", 3, identity("s00"))
    other, sealed, signatures = unpack(RoutedShares, requests["s02"]), list(routed.sealed), list(routed.signatures)
    if attempt == "altered":
        sealed[1] = sealed[1][:-1] + bytes([sealed[1][-1] ^ 1])
    elif attempt == "of another recipient":
        sealed[1], signatures[1] = other.sealed[1], other.signatures[1]
    else:
        signatures[1] = ""
    with pytest.raises(FederationError, match="'s01' did not sign"):
        open_shares(state, replace(routed, sealed=sealed, signatures=signatures), "study", 3, identity("s00"))


@pytest.mark.attack
@pytest.mark.parametrize("stage", [Stage.KEYS, Stage.SHARES])
def test_a_site_that_signs_with_another_key_is_left_out_and_the_others_sum(stage: Stage) -> None:
    sites = signing_sites()

    def forged(at: Stage, site: str, answer: Payload) -> Payload:
        if at is not stage or site != "s03":
            return answer
        if stage is Stage.KEYS:
            return pack(invented("s03", sites.setting, STRANGER))
        return pack(replace(unpack(DealtShares, answer), signatures=[""] * 4))

    sites.tamper = forged
    server = aggregation(sites)
    requests = server.agree(sites.exchange)
    server.collect(sites.exchange(Stage.VECTOR, requests))
    check_sum(server.unmask(sites.exchange), sites, NAMES[:3])
    assert "did not sign" in server.left_out["s03"]
