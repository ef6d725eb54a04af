from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ld_client.privacy.secagg import (
    Progress,
    SiteState,
    deal_shares,
    mask_update,
    offer_keys,
    open_shares,
    reveal_shares,
)
from ld_common.core.errors import FederationError
from ld_common.protocol.secagg.crypto import SECRET_BYTES, pair_mask, seal, unseal
from ld_common.protocol.secagg.messages import CHECK_WORDS, Payload, Roster, RoutedShares, Stage, unpack
from ld_server.secagg import SecureAggregation
from tests.support.secure_sites import Tamper, check_sum, make_sites, masked_sites, numbers


@pytest.mark.attack
def test_no_site_reveals_both_shares_of_another() -> None:
    sites = make_sites(5)
    sites.silent = {"s01": Stage.VECTOR}
    sites.run()
    names = sorted(sites.updates)
    for answer in sites.answers[Stage.UNMASK].values():
        assert [len(share) for share in answer["shares"]] == [SECRET_BYTES] * len(names)
    for name, content in sites.states.items():
        state = SiteState.from_bytes(content)
        if name == "s01":
            continue
        assert state.progress is Progress.REVEALED and not state.shares and not state.seed and not state.masking_secret


@pytest.mark.parametrize(
    ("survivors", "dropped", "words"),
    [
        (["s01", "s02", "s03", "s04"], ["s00"], "listed as dropped"),
        (["s00", "s01", "s02"], ["s03", "s04"], "the threshold is 4"),
        (["s00", "s01", "s02", "s03", "s04"], ["s04"], "exactly once"),
        (["s00", "s01", "s02", "s03"], [], "exactly once"),
        (["s00", "s01", "s02", "s03", "s04", "s05"], [], "exactly once"),
        (["s00", "s00", "s01", "s02", "s03"], [], "exactly once"),
    ],
)
@pytest.mark.attack
def test_a_site_refuses_lists_that_would_unmask_more_than_the_sum(
    survivors: list[str], dropped: list[str], words: str
) -> None:
    _, state, due = masked_sites()
    with pytest.raises(FederationError, match=words):
        reveal_shares(state, replace(due, survivors=survivors, dropped=dropped))


@pytest.mark.attack
def test_a_site_answers_each_stage_once() -> None:
    sites, state, due = masked_sites()
    with pytest.raises(FederationError, match="another round"):
        reveal_shares(state, replace(due, session=bytes(32)))
    after, _ = reveal_shares(state, due)
    for request in (due, replace(due, survivors=due.survivors[:4], dropped=due.survivors[4:])):
        with pytest.raises(FederationError, match="revealed shares"):
            reveal_shares(after, request)
    roster = unpack(Roster, sites.requests[Stage.SHARES]["s00"])
    routed = unpack(RoutedShares, sites.requests[Stage.VECTOR]["s00"])
    for repeat in (
        lambda: deal_shares(state, roster),
        lambda: open_shares(state, routed, "study", 3),
        lambda: mask_update(state, sites.updates["s00"]),
    ):
        with pytest.raises(FederationError, match="sent its vector"):
            repeat()


@pytest.mark.attack
def test_a_round_whose_vector_left_is_not_served_again() -> None:
    _, state, _ = masked_sites()
    for server_round in (2, 3):
        with pytest.raises(FederationError, match="round 4"):
            offer_keys("s00", replace(state.setting, round=server_round), previous=state)
    offer_keys("s00", replace(state.setting, round=4), previous=state)
    offer_keys("s00", replace(state.setting, study="other", round=1), previous=state)
    before, _ = offer_keys("s00", state.setting)
    again, _ = offer_keys("s00", state.setting, previous=before)
    assert again.sealing_secret != before.sealing_secret
    with pytest.raises(FederationError, match="5 or more"):
        offer_keys("s00", state.setting, fewest=5)


@pytest.mark.attack
def test_a_site_refuses_a_roster_that_is_too_small_repeats_a_key_or_is_without_its_own() -> None:
    sites = make_sites(5)
    SecureAggregation(sites.setting, list(sites.updates)).agree(sites.exchange)
    good = unpack(Roster, sites.requests[Stage.SHARES]["s00"])
    state, own = offer_keys("s00", sites.setting)
    sealing, masking = [own.sealing_key, *good.sealing_keys[1:]], [own.masking_key, *good.masking_keys[1:]]
    fresh = Roster(good.sites, sealing, masking, good.signatures)
    deal_shares(state, fresh)
    bad = {
        "other keys": good,
        "a roster of 3 sites": Roster(good.sites[:3], sealing[:3], masking[:3], [""] * 3),
        "not two of each": Roster(good.sites, [*sealing[:4], sealing[3]], masking, [""] * 5),
        "not two of each site": Roster(good.sites, sealing, [*masking[:4], sealing[0]], [""] * 5),
        "not two of": Roster(good.sites, sealing[:4], masking, [""] * 5),
        "lacks 's00'": Roster(["s000", *good.sites[1:]], sealing, masking, [""] * 5),
        "stand twice": Roster(["s00", "s01", "s02", "s03", "s03"], sealing, masking, [""] * 5),
    }
    for words, roster in bad.items():
        with pytest.raises(FederationError, match=words):
            deal_shares(state, roster)


@pytest.mark.attack
def test_shares_of_one_round_serve_in_no_other() -> None:
    first, second = make_sites(3), make_sites(3)
    second.setting = replace(second.setting, round=4)
    for sites in (first, second):
        SecureAggregation(sites.setting, list(sites.updates)).agree(sites.exchange)
    state = SiteState.from_bytes(second.states["s00"])
    names, session = sorted(second.updates), state.session
    old = [b"", *(first.answers[Stage.SHARES][name]["sealed"][0] for name in names[1:])]
    with pytest.raises(FederationError, match="another round"):
        session_of_first = SiteState.from_bytes(first.states["s00"]).session
        open_shares(state, RoutedShares(session_of_first, names, old, [""] * 3), "study", 4)
    opened = open_shares(state, RoutedShares(session, names, old, [""] * 3), "study", 4)
    assert list(opened.shares) == ["s00"], "shares sealed in round 3 do not open in round 4"
    new = [b"", *(second.answers[Stage.SHARES][name]["sealed"][0] for name in names[1:])]
    routed = RoutedShares(session, names, new, [""] * 3)
    assert sorted(open_shares(state, routed, "study", 4).shares) == names
    for study, server_round in (("study", 3), ("other", 4)):
        with pytest.raises(FederationError, match="another study or round"):
            open_shares(state, routed, study, server_round)


@pytest.mark.attack
def test_the_same_keys_mask_and_seal_otherwise_in_another_round_or_crowd() -> None:
    mine, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    theirs = other.public_key().public_bytes_raw()
    mask = pair_mask(mine, theirs, b"crowd", "a", "b", 50)
    back = pair_mask(other, mine.public_key().public_bytes_raw(), b"crowd", "b", "a", 50)
    assert not (mask + back).any()
    assert (mask != pair_mask(mine, theirs, b"another", "a", "b", 50)).any()
    sealed = seal(bytes(32), b"session", "a", "b", b"shares")
    assert unseal(bytes(32), b"session", "a", "b", sealed) == b"shares"
    for other_context in ((b"another", "a", "b"), (b"session", "b", "a"), (b"session", "a", "c")):
        assert unseal(bytes(32), *other_context, sealed) is None
    setting, roster = make_sites(3).setting, Roster(["a"], [b"key"], [b"other key"], [""])
    settings = [setting, replace(setting, round=1), replace(setting, study="other"), replace(setting, clip=2.0)]
    assert len({roster.session(one) for one in settings}) == len(settings)


def alter(stage: Stage, site: str, **changes: Any) -> Tamper:
    """One site's answer to one stage with other values; a callable changes what was there."""

    def tamper(at: Stage, name: str, answer: Payload) -> Payload:
        if (at, name) != (stage, site):
            return answer
        return answer | {key: change(answer[key]) if callable(change) else change for key, change in changes.items()}

    return tamper


def flip(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (Stage.KEYS, {"sealing_key": bytes(32)}),
        (Stage.KEYS, {"masking_key": b"short"}),
        (Stage.KEYS, {"masking_key": "words"}),
        (Stage.KEYS, {"another": 1}),
        (Stage.SHARES, {"session": bytes(32)}),
        (Stage.SHARES, {"sealed": lambda sealed: sealed[1:]}),
        (Stage.SHARES, {"sealed": lambda sealed: [*sealed[:-1], b"short"]}),
        (Stage.SHARES, {"seed_share_marks": lambda marks: marks[:-1]}),
        (Stage.SHARES, {"seed_mark": b""}),
        (Stage.VECTOR, {"session": bytes(32)}),
        (Stage.VECTOR, {"vector": lambda vector: vector[:-4]}),
        (Stage.VECTOR, {"vector": [b"list"]}),
    ],
)
@pytest.mark.attack
def test_a_malformed_answer_leaves_its_site_out(stage: Stage, changes: dict[str, Any]) -> None:
    sites = make_sites(4)
    sites.tamper = alter(stage, "s02", **changes)
    check_sum(sites.run(), sites, ["s00", "s01", "s03"])


@pytest.mark.parametrize(
    "changes",
    [
        {"session": bytes(32)},
        {"shares": lambda shares: shares[1:]},
        {"shares": lambda shares: [b"", *shares[1:]]},
        {"shares": lambda shares: [flip(share) for share in shares]},
        {"shares": lambda shares: list(reversed(shares))},
    ],
)
@pytest.mark.attack
def test_false_shares_of_one_site_do_no_harm_while_others_suffice(changes: dict[str, Any]) -> None:
    sites = make_sites(4)
    sites.tamper = alter(Stage.UNMASK, "s00", **changes)
    check_sum(sites.run(), sites, sorted(sites.updates))
    sites = make_sites(4)
    sites.silent = {"s03": Stage.UNMASK}
    sites.tamper = alter(Stage.UNMASK, "s00", **changes)
    with pytest.raises(FederationError):
        sites.run()


@pytest.mark.attack
def test_a_site_that_deals_shares_which_do_not_open_is_named() -> None:
    sites = make_sites(4)
    garbage = {"sealed": lambda sealed: [flip(one) if one else one for one in sealed]}
    sites.tamper = alter(Stage.SHARES, "s02", **garbage)
    with pytest.raises(FederationError, match="only 1 valid shares of 's02'"):
        sites.run()
    sites = make_sites(4)
    sites.tamper = alter(Stage.SHARES, "s02", seed_mark=bytes(32))
    with pytest.raises(FederationError, match="'s02' dealt shares of another seed"):
        sites.run()


@pytest.mark.parametrize("noise", [flip, lambda vector: bytes(len(vector))])
@pytest.mark.attack
def test_a_vector_that_was_masked_otherwise_is_noticed(noise: Callable[[bytes], bytes]) -> None:
    sites = make_sites(4, 50)
    sites.tamper = alter(Stage.VECTOR, "s01", vector=lambda vector: noise(vector[::-1])[::-1])
    with pytest.raises(FederationError, match="inconsistent"):
        sites.run()


@pytest.mark.attack
def test_a_number_that_no_levels_sum_to_is_noticed() -> None:
    sites = make_sites(4)

    def shift(vector: bytes) -> bytes:
        shifted = np.frombuffer(vector, "<u4").copy()
        shifted[:1] += np.uint32(2**31)  # an array wraps around, a scalar warns
        return shifted.tobytes()

    sites.tamper = alter(Stage.VECTOR, "s01", vector=shift)
    with pytest.raises(FederationError, match="more than 4 sites reach"):
        sites.run()


@pytest.mark.attack
def test_sites_that_offer_one_key_are_left_out() -> None:
    sites = make_sites(5, threshold=3)
    stolen: list[Any] = []

    def copy(stage: Stage, site: str, answer: Payload) -> Payload:
        if stage is Stage.KEYS and site == "s00":
            stolen.append(answer["masking_key"])
        return answer | {"masking_key": stolen[0]} if (stage, site) == (Stage.KEYS, "s01") else answer

    sites.tamper = copy
    check_sum(sites.run(), sites, ["s02", "s03", "s04"])


@pytest.mark.attack
def test_a_server_that_names_other_crowds_to_different_sites_gets_noise() -> None:
    sites = make_sites(4, threshold=3)
    server = SecureAggregation(sites.setting, list(sites.updates))
    requests = server.agree(sites.exchange)
    requests["s00"] = requests["s00"] | {
        "dealers": ["s00", "s01", "s02"],
        "sealed": requests["s00"]["sealed"][:3],
        "signatures": requests["s00"]["signatures"][:3],
    }
    server.collect(sites.exchange(Stage.VECTOR, requests))
    with pytest.raises(FederationError, match="exactly once"):
        server.unmask(sites.exchange)
    masked = [numbers(answer) for answer in sites.answers[Stage.VECTOR].values()]
    assert (np.sum(masked, axis=0, dtype=np.uint32)[-CHECK_WORDS:] != 4).all()
