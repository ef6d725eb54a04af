"""The server's half of secure aggregation: runs the stages, and learns the sum of the surviving sites' updates.

A site without a valid answer is left out of the later stages. If fewer sites than the threshold remain, the round fails
before anything is unmasked; an inconsistent sum fails it, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from ld_common.core.errors import FederationError
from ld_common.protocol.secagg.crypto import (
    DIGEST_BYTES,
    SEALED_BYTES,
    SECRET_BYTES,
    agree,
    crowd_digest,
    mark,
    masking_key,
    pair_mask,
    self_mask,
)
from ld_common.protocol.secagg.identities import Peers
from ld_common.protocol.secagg.messages import (
    CHECK_WORDS,
    DealtShares,
    KeyOffer,
    MaskedVector,
    Payload,
    RevealedShares,
    Roster,
    RoutedShares,
    SecaggSetting,
    Stage,
    UnmaskRequest,
    dequantise,
    pack,
    require,
    unpack,
)

Exchange = Callable[[Stage, dict[str, Payload]], Mapping[str, Mapping[str, object]]]
"""Sends a stage's request to each site and returns the received answers by site."""
P = TypeVar("P")


@dataclass(frozen=True)
class SecureSum:
    """Sum of the updates of `sites`, each within the setting's clipping range, off by half a step a site."""

    vector: NDArray[np.float64]
    sites: list[str]


class SecureAggregation:
    """One round: `agree`, then the sites train, then `collect` (or `take` and `end_collection`), then `unmask`.

    `left_out` holds, by site, why it is not in the sum.
    """

    def __init__(self, setting: SecaggSetting, sites: Sequence[str], peers: Peers | None = None) -> None:
        """Begin a round.

        Args:
            setting: what all sites agree on.
            sites: who takes part.
            peers: keys of deployed sites; an answer that its site did not sign leaves that site out, as the others
                would refuse the round.
        """
        self.setting, self.peers = setting, peers
        self.left_out: dict[str, str] = {}
        self._sites = sorted(set(sites))
        require(len(self._sites) == setting.sites, f"{len(self._sites)} sites for a setting of {setting.sites}")
        self._roster = Roster([], [], [], [])
        self._session = b""
        self._dealt: dict[str, DealtShares] = {}
        self._taken: set[str] = set()
        self._survivors: list[str] = []
        self._total = np.zeros(setting.length + CHECK_WORDS, np.uint32)

    def agree(self, exchange: Exchange) -> dict[str, Payload]:
        """Stages `keys` and `shares`; returns the request of stage `vector` for each site that is to train.

        Raises:
            FederationError: fewer sites than the threshold are left.
        """
        answers = exchange(Stage.KEYS, {site: pack(self.setting) for site in self._sites})
        offers = self._read(Stage.KEYS, self._sites, answers, KeyOffer, self._check_offer)
        held = [key for offer in offers.values() for key in (offer.sealing_key, offer.masking_key)]
        for site, offer in list(offers.items()):
            if held.count(offer.sealing_key) > 1 or held.count(offer.masking_key) > 1:
                self.left_out[site] = "it offered a key that stands twice in the round"
                del offers[site]
        self._require_enough(Stage.KEYS, len(offers))
        self._roster = Roster(
            sites=list(offers),
            sealing_keys=[offer.sealing_key for offer in offers.values()],
            masking_keys=[offer.masking_key for offer in offers.values()],
            signatures=[offer.signature for offer in offers.values()],
        )
        self._session = self._roster.session(self.setting)
        answers = exchange(Stage.SHARES, {site: pack(self._roster) for site in offers})
        self._dealt = self._read(Stage.SHARES, self._roster.sites, answers, DealtShares, self._check_dealt)
        self._require_enough(Stage.SHARES, len(self._dealt))
        return {site: self._routed(site) for site in self._dealt}

    def collect(self, answers: Mapping[str, Mapping[str, object]]) -> list[str]:
        """Stage `vector` with all answers at hand: `take` for each, then `end_collection`; raises as that does."""
        for site, answer in answers.items():
            with contextlib.suppress(FederationError):
                self.take(site, answer)
        return self.end_collection()

    def take(self, site: str, answer: Mapping[str, object]) -> None:
        """Stage `vector`: add a site's masked vector to the sum, in any order of the sites.

        Raises:
            FederationError: it cannot be used, and the site is left out.
        """
        require(site in self._dealt, "it did not deal shares")
        if site in self._taken or site in self.left_out:
            return
        try:
            masked = unpack(MaskedVector, answer)
            self._check_vector(site, masked)
        except FederationError as error:
            self.left_out[site] = f"stage '{Stage.VECTOR}' of secure aggregation: {error}"
            raise
        self._total += np.frombuffer(masked.vector, dtype="<u4")
        self._taken.add(site)

    def end_collection(self) -> list[str]:
        """End stage `vector`; returns the sites whose vectors are in the sum.

        Raises:
            FederationError: they are fewer than the threshold.
        """
        for site in self._dealt:
            if site not in self._taken:
                self.left_out.setdefault(site, f"stage '{Stage.VECTOR}' of secure aggregation: it did not answer")
        self._survivors = [site for site in self._dealt if site in self._taken]
        self._require_enough(Stage.VECTOR, len(self._survivors))
        return self._survivors

    def unmask(self, exchange: Exchange) -> SecureSum:
        """Stage `unmask`: remove the survivors' self masks, and their pair masks with dropped sites.

        Raises:
            FederationError: fewer sites than the threshold reveal shares, a site dealt wrong shares, or the sum is
                inconsistent.
        """
        dropped = [site for site in self._dealt if site not in self._survivors]
        request = pack(UnmaskRequest(self._session, self._survivors, dropped))
        answers = exchange(Stage.UNMASK, {site: request for site in self._survivors})
        revealed = self._read(Stage.UNMASK, self._survivors, answers, RevealedShares, self._check_revealed)
        self._require_enough(Stage.UNMASK, len(revealed))
        total = self._total
        for place, site in enumerate(self._dealt):
            shares = {revealer: answer.shares[place] for revealer, answer in revealed.items()}
            total = total - (
                self._self_mask(site, shares) if site in self._survivors else self._pair_masks(site, shares)
            )
        count = len(self._survivors)
        checks = bool((total[self.setting.length :] == count).all())
        require(checks, "the unmasked sum is inconsistent: a site used other masks than agreed; the sum is discarded")
        return SecureSum(dequantise(total[: self.setting.length], count, self.setting), self._survivors)

    def _read(
        self,
        stage: Stage,
        sites: Iterable[str],
        answers: Mapping[str, Mapping[str, object]],
        kind: type[P],
        check: Callable[[str, P], None],
    ) -> dict[str, P]:
        """The valid answers of these sites, in their order; records why the others are left out."""
        valid: dict[str, P] = {}
        for site in sites:
            try:
                require(site in answers, "it did not answer")
                answer = unpack(kind, answers[site])
                check(site, answer)
                valid[site] = answer
            except FederationError as error:
                if stage is not Stage.UNMASK:  # in the last stage, a site without an answer is still in the sum
                    self.left_out[site] = f"stage '{stage}' of secure aggregation: {error}"
        return valid

    def _require_enough(self, stage: Stage, count: int) -> None:
        reasons = "; ".join(f"{site}: {reason}" for site, reason in sorted(self.left_out.items()))
        problem = f"{count} of {self.setting.sites} sites remain after stage '{stage}' of secure aggregation"
        remedy = f"{self.setting.threshold} are needed: nothing is unmasked, start a new round"
        require(count >= self.setting.threshold, f"{problem}, {remedy}" + (f" ({reasons})" if reasons else ""))

    def _check_offer(self, site: str, offer: KeyOffer) -> None:
        for public in (offer.sealing_key, offer.masking_key):
            agree(X25519PrivateKey.generate(), public)  # refuses a key that other sites could not use
        if self.peers is not None:
            self.peers.check_offer(self.setting, site, offer)

    def _check_dealt(self, site: str, dealt: DealtShares) -> None:
        sites = self._roster.sites
        require(dealt.session == self._session, "its shares are of another round or roster")
        sizes = [0 if peer == site else SEALED_BYTES for peer in sites]
        require([len(sealed) for sealed in dealt.sealed] == sizes, "its sealed shares have the wrong size")
        lists = (dealt.seed_share_marks, dealt.key_share_marks)
        marks = [dealt.seed_mark, *dealt.seed_share_marks, *dealt.key_share_marks]
        marked = all(len(marks) == len(sites) for marks in lists) and {len(digest) for digest in marks} == {
            DIGEST_BYTES
        }
        require(marked, "it did not mark each of its shares")
        require(len(dealt.signatures) == len(sites), "it did not sign each of its shares")
        if self.peers is not None:
            for peer, sealed, signature in zip(sites, dealt.sealed, dealt.signatures, strict=True):
                if peer != site:
                    self.peers.check_share(self._session, site, peer, sealed, signature)

    def _check_vector(self, site: str, masked: MaskedVector) -> None:
        require(masked.session == self._session, "its vector is of another round or roster")
        size = 4 * len(self._total)
        require(len(masked.vector) == size, f"its vector has {len(masked.vector)} bytes, not {size}")

    def _check_revealed(self, site: str, revealed: RevealedShares) -> None:
        require(revealed.session == self._session, "its revealed shares are of another round or roster")
        require(len(revealed.shares) == len(self._dealt), "it did not reveal one share for each site")

    def _routed(self, recipient: str) -> Payload:
        place = self._roster.sites.index(recipient)
        return pack(
            RoutedShares(
                session=self._session,
                dealers=list(self._dealt),
                sealed=[dealt.sealed[place] for dealt in self._dealt.values()],
                signatures=[dealt.signatures[place] for dealt in self._dealt.values()],
            )
        )

    def _self_mask(self, site: str, shares: Mapping[str, bytes]) -> NDArray[np.uint32]:
        """The self mask of a surviving site."""
        seed = self._reconstruct("seed share", site, self._dealt[site].seed_share_marks, shares)
        agreed = mark(self._session, "seed", site, "", seed) == self._dealt[site].seed_mark
        require(agreed, f"'{site}' dealt shares of another seed than it marked: leave it out of a new round")
        return self_mask(seed, crowd_digest(self._session, list(self._dealt)), site, len(self._total))

    def _pair_masks(self, site: str, shares: Mapping[str, bytes]) -> NDArray[np.uint32]:
        """The survivors' pair masks with a dropped site."""
        secret = self._reconstruct("key share", site, self._dealt[site].key_share_marks, shares)
        private, crowd = (
            masking_key(secret, self.setting.digest(), site),
            crowd_digest(self._session, list(self._dealt)),
        )
        public = dict(zip(self._roster.sites, self._roster.masking_keys, strict=True))
        agreed = private.public_key().public_bytes_raw() == public[site]
        require(agreed, f"'{site}' dealt shares of another key than it offered: leave it out of a new round")
        total = np.zeros_like(self._total)
        for survivor in self._survivors:
            total += pair_mask(private, public[survivor], crowd, survivor, site, len(total))
        return total

    def _reconstruct(self, kind: str, dealer: str, marks: Sequence[bytes], shares: Mapping[str, bytes]) -> bytes:
        """A secret from as many shares as the threshold, among those with their dealer's mark."""
        valid = []
        for index, (recipient, expected) in enumerate(zip(self._roster.sites, marks, strict=True), start=1):
            if recipient in shares and mark(self._session, kind, dealer, recipient, shares[recipient]) == expected:
                valid.append((index, shares[recipient]))
        few = f"only {len(valid)} valid shares of '{dealer}' came, {self.setting.threshold} are needed"
        require(len(valid) >= self.setting.threshold, f"{few}: the sum stays masked, leave it out of a new round")
        require({len(share) for _, share in valid} == {SECRET_BYTES}, f"'{dealer}' marked shares of the wrong size")
        return Shamir.combine(valid[: self.setting.threshold], False)
