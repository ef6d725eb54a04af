"""A site's half of secure aggregation: one function a stage, from state and request to new state and answer.

    offer_keys -> deal_shares -> open_shares -> (the site trains) -> mask_update -> reveal_shares

A site must store its new state before it sends the answer. Otherwise the server could ask again after a restart, and
two answers of one stage can reveal what one does not.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from ld_common.core.errors import FederationError
from ld_common.protocol.secagg.crypto import (
    SEALED_BYTES,
    SECRET_BYTES,
    agree,
    crowd_digest,
    mark,
    masking_key,
    pair_mask,
    seal,
    self_mask,
    unseal,
)
from ld_common.protocol.secagg.identities import Identity
from ld_common.protocol.secagg.messages import (
    CHECK_WORDS,
    DealtShares,
    KeyOffer,
    MaskedVector,
    RevealedShares,
    Roster,
    RoutedShares,
    SecaggSetting,
    Stage,
    UnmaskRequest,
    quantise,
    require,
    unpack,
)


class Progress(StrEnum):
    """The last stage that a site has completed in a round."""

    OFFERED = "offered keys"
    DEALT = "dealt shares"
    OPENED = "opened shares"
    MASKED = "sent its vector"
    REVEALED = "revealed shares"


@dataclass(frozen=True)
class SiteState:
    """A site's state between stages. It holds secrets, so only the site may read where it is stored.

    Each secret is deleted in the last stage that needs it, so that a state which is stolen later reveals nothing.
    """

    progress: Progress
    site: str
    setting: SecaggSetting
    sealing_secret: bytes = b""
    masking_secret: bytes = b""
    seed: bytes = b""
    roster: Roster | None = None
    session: bytes = b""
    dealers: list[str] = field(default_factory=list)
    shares: dict[str, bytes] = field(default_factory=dict)
    """Dealer -> share of its seed, then share of its key."""
    earliest: dict[str, int] = field(default_factory=dict)
    """Digest of each former study -> the first round of it that may still be answered."""

    def to_bytes(self) -> bytes:
        """The state as JSON."""
        return json.dumps(asdict(self), default=bytes.hex).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> SiteState:
        """The state of `to_bytes`; raises `FederationError` for anything else."""
        try:
            fields = json.loads(content)
            roster = fields["roster"]
            if roster is not None:
                keys = {name: list(map(bytes.fromhex, roster[name])) for name in ("sealing_keys", "masking_keys")}
                fields["roster"] = Roster(sites=roster["sites"], signatures=roster["signatures"], **keys)
            for name in ("sealing_secret", "masking_secret", "seed", "session"):
                fields[name] = bytes.fromhex(fields[name])
            fields["shares"] = {dealer: bytes.fromhex(share) for dealer, share in fields["shares"].items()}
            return cls(
                **fields | {"progress": Progress(fields["progress"]), "setting": SecaggSetting(**fields["setting"])}
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FederationError(
                "the site's state of secure aggregation cannot be read: wait for a new round"
            ) from error

    def earliest_rounds(self) -> dict[str, int]:
        """`earliest` with the present study, whose round is past once its vector left."""
        sent = self.progress in (Progress.MASKED, Progress.REVEALED)
        return self.earliest | {self.setting.study: self.setting.round + (1 if sent else 0)}

    def expect(self, progress: Progress, stage: str) -> None:
        """Refuse a stage out of turn; raises `FederationError`."""
        require(self.progress is progress, f"stage '{stage}' was requested, but the site has {self.progress}: refused")

    def check_session(self, session: bytes) -> None:
        """Refuse a request of another round, study or roster; raises `FederationError`."""
        require(session == self.session, "the request is of another round, study or set of sites: refused")


def answer_stage(
    stage: Stage,
    site: str,
    request: Mapping[str, object],
    state: SiteState | None,
    fewest: int = 2,
    identity: Identity | None = None,
) -> tuple[SiteState, KeyOffer | DealtShares | RevealedShares]:
    """Answer any stage but `vector`, whose training lies between `open_shares` and `mask_update`.

    Args:
        stage: the stage.
        site: the site's name.
        request: as it arrived.
        state: the site's; None before its first round.
        fewest: as in `offer_keys`.
        identity: the keys of a deployed site and its peers.

    Raises:
        FederationError: the request is malformed, out of turn, or asks for secrets that must stay hidden.
    """
    if stage is Stage.KEYS:
        return offer_keys(site, unpack(SecaggSetting, request), fewest, state, identity)
    current = begun(state)
    if stage is Stage.SHARES:
        return deal_shares(current, unpack(Roster, request), identity)
    require(stage is Stage.UNMASK, f"stage '{stage}' has no answer without training: refused")
    return reveal_shares(current, unpack(UnmaskRequest, request))


def begun(state: SiteState | None) -> SiteState:
    """The state of a round that has begun; raises `FederationError` for None."""
    if state is None:
        raise FederationError("the server continued a secure round that this site has not begun")
    return state


def offer_keys(
    site: str,
    setting: SecaggSetting,
    fewest: int = 2,
    previous: SiteState | None = None,
    identity: Identity | None = None,
) -> tuple[SiteState, KeyOffer]:
    """Stage `keys`: fresh secrets for one round.

    Args:
        site: the site's name.
        setting: the request.
        fewest: fewest sites in a sum that the server may learn.
        previous: the site's state so far, if any. A round whose vector left is not answered again: the difference of
            two sums over different sites could be one site's update.
        identity: of a deployed site, which signs its keys.

    Raises:
        FederationError: the threshold is below `fewest`, or the round was answered before.
    """
    low = f"the threshold is {setting.threshold} sites, this site allows {fewest} or more: raise secure_threshold"
    require(setting.threshold >= fewest, low)
    earliest = {} if previous is None else previous.earliest_rounds()
    first = earliest.get(setting.study, 0)
    require(setting.round >= first, f"round {setting.round} was answered or is past: continue with round {first}")
    sealing, masking = secrets.token_bytes(32), secrets.token_bytes(SECRET_BYTES)
    state = SiteState(
        Progress.OFFERED, site, setting, sealing_secret=sealing, masking_secret=masking, earliest=earliest
    )
    offer = _public_keys(state)
    return state, offer if identity is None else replace(offer, signature=identity.sign_offer(setting, site, offer))


def deal_shares(state: SiteState, roster: Roster, identity: Identity | None = None) -> tuple[SiteState, DealtShares]:
    """Stage `shares`: for each site, encrypted shares of this site's mask seed and of its masking key.

    Raises:
        FederationError: out of turn, or the roster has too few sites, repeats a key, lacks this site's keys, or holds
            keys that no approved site signed.
    """
    state.expect(Progress.OFFERED, "shares")
    roster.check(state.setting)
    require(state.site in roster.sites, f"the roster lacks '{state.site}': refused")
    place, offered = roster.sites.index(state.site), _public_keys(state)
    listed = KeyOffer(roster.sealing_keys[place], roster.masking_keys[place])
    require(listed == offered, f"the roster has other keys of '{state.site}' than it offered: refused")
    if identity is not None:
        identity.check_roster(state.setting, roster)
    session, seed = roster.session(state.setting), secrets.token_bytes(SECRET_BYTES)
    size = (state.setting.threshold, len(roster.sites))
    seeds = [share for _, share in Shamir.split(*size, seed, False)]
    keys = [share for _, share in Shamir.split(*size, state.masking_secret, False)]
    sealing, sealed = X25519PrivateKey.from_private_bytes(state.sealing_secret), []
    signatures = []
    for peer, public, both in zip(roster.sites, roster.sealing_keys, map(bytes.__add__, seeds, keys), strict=True):
        itself = peer == state.site
        sealed.append(b"" if itself else seal(agree(sealing, public), session, state.site, peer, both))
        if identity is None or itself:
            signatures.append("")
        else:
            signatures.append(identity.sign_share(session, state.site, peer, sealed[-1]))
    answer = DealtShares(
        session=session,
        sealed=sealed,
        seed_mark=mark(session, "seed", state.site, "", seed),
        seed_share_marks=_marks(session, "seed share", state.site, roster.sites, seeds),
        key_share_marks=_marks(session, "key share", state.site, roster.sites, keys),
        signatures=signatures,
    )
    shares = {state.site: seeds[place] + keys[place]}
    return replace(state, progress=Progress.DEALT, seed=seed, roster=roster, session=session, shares=shares), answer


def open_shares(
    state: SiteState, routed: RoutedShares, study: str, server_round: int, identity: Identity | None = None
) -> SiteState:
    """First half of stage `vector`, before training: decrypt the shares that other sites dealt to this one.

    A share that cannot be decrypted is dropped: the site still masks towards its dealer, and has nothing to reveal.

    Args:
        state: the site's state.
        routed: the request.
        study: digest of the study to train.
        server_round: the round to train.
        identity: of a deployed site, which checks who signed the shares.

    Raises:
        FederationError: out of turn, of another round or study, with too few or unknown dealers, or with a share that
            its dealer did not sign.
    """
    state.expect(Progress.DEALT, "vector")
    state.check_session(routed.session)
    same = (state.setting.study, state.setting.round) == (study, server_round)
    require(same, "the keys were agreed for another study or round than the one to train: refused")
    roster, dealers = _roster(state), routed.dealers
    listed = dealers == sorted(set(dealers)) and set(dealers) <= set(roster.sites) and state.site in dealers
    require(
        listed and len(routed.sealed) == len(routed.signatures) == len(dealers),
        "the dealers are not a sorted list of the roster's sites: refused",
    )
    enough = len(dealers) >= state.setting.threshold
    require(enough, f"shares of {len(dealers)} sites, the threshold is {state.setting.threshold}: refused")
    sealing, shares = X25519PrivateKey.from_private_bytes(state.sealing_secret), dict(state.shares)
    for dealer, sealed, signature in zip(dealers, routed.sealed, routed.signatures, strict=True):
        if dealer == state.site:
            continue
        if identity is not None:
            identity.check_share(state.session, dealer, state.site, sealed, signature)
        secret = agree(sealing, roster.sealing_keys[roster.sites.index(dealer)])
        both = unseal(secret, state.session, dealer, state.site, sealed) if len(sealed) == SEALED_BYTES else None
        if both is not None:
            shares[dealer] = both
    return replace(state, progress=Progress.OPENED, sealing_secret=b"", dealers=dealers, shares=shares)


def mask_update(state: SiteState, update: NDArray[np.float64]) -> tuple[SiteState, MaskedVector, int]:
    """Second half of stage `vector`: the update quantised and masked, and the number of clipped values.

    Args:
        state: the site's state.
        update: trained minus start, as `ld_common.protocol.secagg.messages.flatten` gives it.

    Raises:
        FederationError: out of turn, or the update has another length or holds NaN.
    """
    state.expect(Progress.OPENED, "vector")
    levels, clipped = quantise(update, state.setting)
    masked = np.concatenate([levels, np.ones(CHECK_WORDS, np.uint32)])
    roster, crowd = _roster(state), crowd_digest(state.session, state.dealers)
    private = masking_key(state.masking_secret, state.setting.digest(), state.site)
    masked += self_mask(state.seed, crowd, state.site, len(masked))
    for peer in state.dealers:
        if peer != state.site:
            public = roster.masking_keys[roster.sites.index(peer)]
            masked += pair_mask(private, public, crowd, state.site, peer, len(masked))
    answer = MaskedVector(state.session, masked.astype("<u4").tobytes())
    return replace(state, progress=Progress.MASKED, masking_secret=b"", seed=b"", roster=None), answer, clipped


def reveal_shares(state: SiteState, request: UnmaskRequest) -> tuple[SiteState, RevealedShares]:
    """Stage `unmask`, once a round: the seed's share of each surviving site, the key's share of each dropped one.

    Raises:
        FederationError: out of turn, fewer survivors than the threshold, a site in both lists or in neither, or this
            site among the dropped.
    """
    state.expect(Progress.MASKED, "unmask")
    state.check_session(request.session)
    survivors, dropped = request.survivors, request.dropped
    require(sorted([*survivors, *dropped]) == state.dealers, "the lists do not hold every site exactly once: refused")
    require(state.site in survivors, f"'{state.site}' sent its vector but is listed as dropped: refused")
    enough = len(survivors) >= state.setting.threshold
    require(enough, f"only {len(survivors)} sites survived, the threshold is {state.setting.threshold}: refused")
    shares = []
    for dealer in state.dealers:
        both = state.shares.get(dealer, b"")
        shares.append(both[:SECRET_BYTES] if dealer in survivors else both[SECRET_BYTES:])
    return replace(state, progress=Progress.REVEALED, shares={}), RevealedShares(state.session, shares)


def _public_keys(state: SiteState) -> KeyOffer:
    sealing = X25519PrivateKey.from_private_bytes(state.sealing_secret)
    masking = masking_key(state.masking_secret, state.setting.digest(), state.site)
    return KeyOffer(sealing.public_key().public_bytes_raw(), masking.public_key().public_bytes_raw())


def _marks(session: bytes, kind: str, dealer: str, recipients: list[str], shares: list[bytes]) -> list[bytes]:
    return [mark(session, kind, dealer, recipient, share) for recipient, share in zip(recipients, shares, strict=True)]


def _roster(state: SiteState) -> Roster:
    if state.roster is None:
        raise FederationError("the site's state has no roster: wait for a new round")
    return state.roster
