"""A site's half of secure aggregation: one function a stage, from the site's state and a request to both anew.

    offer_keys -> deal_shares -> open_shares -> (the site trains) -> mask_update -> reveal_shares

A site must store its new state before it sends the answer. Otherwise a restart would let the server ask twice, and two
answers of one stage can tell what one does not.
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
    """What a site has done last in a round."""

    OFFERED = "offered keys"
    DEALT = "dealt shares"
    OPENED = "opened shares"
    MASKED = "sent its vector"
    REVEALED = "revealed shares"


@dataclass(frozen=True)
class SiteState:
    """What a site keeps between stages. It holds secrets: where it is stored, only the site may read.

    Each secret is emptied in the stage that needs it last, so that a state which is stolen later opens nothing.
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
    """By dealer: its seed's share, then its key's."""

    def to_bytes(self) -> bytes:
        """The state as JSON."""
        return json.dumps(asdict(self), default=bytes.hex).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> SiteState:
        """Undo `to_bytes`; raises `FederationError` when the content is not a state."""
        try:
            fields = json.loads(content)
            roster = fields["roster"]
            if roster is not None:
                keys = {name: list(map(bytes.fromhex, roster[name])) for name in ("sealing_keys", "masking_keys")}
                fields["roster"] = Roster(sites=roster["sites"], **keys)
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

    def expect(self, progress: Progress, stage: str) -> None:
        """Refuse a stage out of turn; raises `FederationError`."""
        require(self.progress is progress, f"'{stage}' was asked of a site that has last {self.progress}: refused")

    def check_session(self, session: bytes) -> None:
        """Refuse a request of another round, study or roster; raises `FederationError`."""
        require(session == self.session, "a request of another round, study or set of sites than the site's: refused")


def answer_stage(
    stage: Stage, site: str, request: Mapping[str, object], state: SiteState | None, fewest: int = 2
) -> tuple[SiteState, KeyOffer | DealtShares | RevealedShares]:
    """Any stage but that of the vector, which is trained between `open_shares` and `mask_update`.

    Args:
        stage: which.
        site: the site's name.
        request: as it arrived.
        state: what the site keeps; None before its first round.
        fewest: as in `offer_keys`.

    Raises:
        FederationError: the request is malformed, out of turn or asks for what must not be revealed.
    """
    if stage is Stage.KEYS:
        return offer_keys(site, unpack(SecaggSetting, request), fewest, state)
    held = begun(state)
    if stage is Stage.SHARES:
        return deal_shares(held, unpack(Roster, request))
    require(stage is Stage.UNMASK, f"stage '{stage}' has no answer without training: refused")
    return reveal_shares(held, unpack(UnmaskRequest, request))


def begun(state: SiteState | None) -> SiteState:
    """What a site keeps of a round; raises `FederationError` where it has begun none."""
    if state is None:
        raise FederationError("secure aggregation was asked to go on with a round that this site has not begun")
    return state


def offer_keys(
    site: str, setting: SecaggSetting, fewest: int = 2, previous: SiteState | None = None
) -> tuple[SiteState, KeyOffer]:
    """Stage `keys`: fresh secrets for one round.

    Args:
        site: the site's name.
        setting: the request.
        fewest: over how few sites' sum the site lets the server learn.
        previous: the site's state of the study so far, if any. A round whose vector left is not served again, since the
            difference of two sums over different sites would be one site's own.

    Raises:
        FederationError: the threshold is below `fewest`, or the round was served.
    """
    low = f"sums over {setting.threshold} sites may be unmasked, the site allows {fewest} or more: raise the threshold"
    require(setting.threshold >= fewest, low)
    if previous is not None and previous.setting.study == setting.study:
        sent = previous.progress in (Progress.MASKED, Progress.REVEALED)
        last = previous.setting.round + (1 if sent else 0)
        require(setting.round >= last, f"round {setting.round} was served or is past: go on with round {last}")
    sealing, masking = secrets.token_bytes(32), secrets.token_bytes(SECRET_BYTES)
    state = SiteState(Progress.OFFERED, site, setting, sealing_secret=sealing, masking_secret=masking)
    return state, _own_keys(state)


def deal_shares(state: SiteState, roster: Roster) -> tuple[SiteState, DealtShares]:
    """Stage `shares`: a share of the own mask's seed and of the masking key for each site, sealed to it.

    Raises:
        FederationError: out of turn, or a roster of too few sites, with a key that stands twice, or without its own.
    """
    state.expect(Progress.OFFERED, "shares")
    roster.check(state.setting)
    require(state.site in roster.sites, f"a roster without '{state.site}': refused")
    place, own = roster.sites.index(state.site), _own_keys(state)
    listed = KeyOffer(roster.sealing_keys[place], roster.masking_keys[place])
    require(listed == own, f"a roster with other keys of '{state.site}' than its own: refused")
    session, seed = roster.session(state.setting), secrets.token_bytes(SECRET_BYTES)
    size = (state.setting.threshold, len(roster.sites))
    seeds = [share for _, share in Shamir.split(*size, seed, False)]
    keys = [share for _, share in Shamir.split(*size, state.masking_secret, False)]
    sealing, sealed = X25519PrivateKey.from_private_bytes(state.sealing_secret), []
    for peer, public, both in zip(roster.sites, roster.sealing_keys, map(bytes.__add__, seeds, keys), strict=True):
        own_place = peer == state.site
        sealed.append(b"" if own_place else seal(agree(sealing, public), session, state.site, peer, both))
    answer = DealtShares(
        session=session,
        sealed=sealed,
        seed_mark=mark(session, "seed", state.site, "", seed),
        seed_share_marks=_marks(session, "seed share", state.site, roster.sites, seeds),
        key_share_marks=_marks(session, "key share", state.site, roster.sites, keys),
    )
    shares = {state.site: seeds[place] + keys[place]}
    return replace(state, progress=Progress.DEALT, seed=seed, roster=roster, session=session, shares=shares), answer


def open_shares(state: SiteState, routed: RoutedShares, study: str, server_round: int) -> SiteState:
    """First half of stage `vector`, before the site trains: the shares that others dealt to this one.

    A share that does not open is none: the site still masks towards its dealer, and has nothing of it to reveal.

    Args:
        state: the site's state.
        routed: the request.
        study: digest of the study that the site is asked to train.
        server_round: number of the round that it is asked to train.

    Raises:
        FederationError: out of turn, of another round or study, or too few or unknown dealers.
    """
    state.expect(Progress.DEALT, "vector")
    state.check_session(routed.session)
    same = (state.setting.study, state.setting.round) == (study, server_round)
    require(same, "keys were agreed for another study or round than the one to train: refused")
    roster, dealers = _roster(state), routed.dealers
    known = dealers == sorted(set(dealers)) and set(dealers) <= set(roster.sites) and state.site in dealers
    require(known and len(routed.sealed) == len(dealers), "dealers that are not sites of the roster, sorted: refused")
    enough = len(dealers) >= state.setting.threshold
    require(enough, f"shares of {len(dealers)} sites, the threshold is {state.setting.threshold}: refused")
    sealing, shares = X25519PrivateKey.from_private_bytes(state.sealing_secret), dict(state.shares)
    for dealer, sealed in zip(dealers, routed.sealed, strict=True):
        if dealer == state.site:
            continue
        secret = agree(sealing, roster.sealing_keys[roster.sites.index(dealer)])
        both = unseal(secret, state.session, dealer, state.site, sealed) if len(sealed) == SEALED_BYTES else None
        if both is not None:
            shares[dealer] = both
    return replace(state, progress=Progress.OPENED, sealing_secret=b"", dealers=dealers, shares=shares)


def mask_update(state: SiteState, update: NDArray[np.float64]) -> tuple[SiteState, MaskedVector, int]:
    """Second half of stage `vector`: the update quantised and masked, and how many of its numbers were clipped.

    Args:
        state: the site's state.
        update: trained less start, as `ld_common.protocol.secagg.messages.flatten` gives it.

    Raises:
        FederationError: out of turn, or an update of another length or with NaN.
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
    """Stage `unmask`, once a round: of each site its seed's share if it survived, its key's share if it dropped out.

    Raises:
        FederationError: out of turn, fewer survivors than the threshold, a site in both lists or in none, or this site
            among the dropped.
    """
    state.expect(Progress.MASKED, "unmask")
    state.check_session(request.session)
    survivors, dropped = request.survivors, request.dropped
    require(sorted([*survivors, *dropped]) == state.dealers, "lists in which not every site stands once: refused")
    require(state.site in survivors, f"'{state.site}' sent its vector and is said to have dropped out: refused")
    enough = len(survivors) >= state.setting.threshold
    require(enough, f"only {len(survivors)} sites survived, the threshold is {state.setting.threshold}: refused")
    shares = []
    for dealer in state.dealers:
        both = state.shares.get(dealer, b"")
        shares.append(both[:SECRET_BYTES] if dealer in survivors else both[SECRET_BYTES:])
    return replace(state, progress=Progress.REVEALED, shares={}), RevealedShares(state.session, shares)


def _own_keys(state: SiteState) -> KeyOffer:
    sealing = X25519PrivateKey.from_private_bytes(state.sealing_secret)
    masking = masking_key(state.masking_secret, state.setting.digest(), state.site)
    return KeyOffer(sealing.public_key().public_bytes_raw(), masking.public_key().public_bytes_raw())


def _marks(session: bytes, kind: str, dealer: str, recipients: list[str], shares: list[bytes]) -> list[bytes]:
    return [mark(session, kind, dealer, recipient, share) for recipient, share in zip(recipients, shares, strict=True)]


def _roster(state: SiteState) -> Roster:
    if state.roster is None:
        raise FederationError("the site's state has no roster: wait for a new round")
    return state.roster
