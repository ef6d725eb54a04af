"""A site's secure aggregation over Flower's messages, with its state between stages in a file of the site's.

Two answers of one stage can reveal a single site's update. So no stage may start anew: neither after a restart, nor in
another run of the study, nor while a task of the same site is still running (`SecaggSiteRound.alone`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor

from ld_client.privacy.secagg import SiteState, answer_stage, begun, mask_update, open_shares
from ld_client.site_config import SiteConfig
from ld_common.core.atomic_files import held, write_bytes
from ld_common.core.errors import FederationError, StoreError
from ld_common.core.state import State
from ld_common.diffusion.options import largest_drift
from ld_common.protocol.secagg.identities import Identity
from ld_common.protocol.secagg.messages import (
    LEVELS,
    Payload,
    RoutedShares,
    SecaggSetting,
    Stage,
    fewest_summed,
    flatten,
    pack,
    require,
    unpack,
)
from ld_common.protocol.study_config import StudyConfig


class SecaggSiteRound:
    """One site's rounds. Each new state is flushed to disk before the answer that follows from it leaves."""

    def __init__(
        self,
        folder: Path,
        site: SiteConfig,
        approved: StudyConfig | None = None,
        identity: Identity | None = None,
    ) -> None:
        """Open a site's state.

        Args:
            folder: where it is kept, mode 0600.
            site: the site.
            approved: the study that a deployed site approved, and the only one that it takes part in.
            identity: keys of a deployed site and of the sites that it approved.
        """
        self.site, self.approved, self.identity = site, approved, identity
        self.file, self.lock = folder / f"{site.site}.json", folder / f"{site.site}.lock"

    def alone(self) -> AbstractContextManager[None]:
        """Wait until no other task of this site runs, and hold the others off.

        Raises:
            StoreError: the folder above it is missing, such as an unmounted disk, or cannot be written.
        """
        try:
            self.file.parent.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise StoreError(f"cannot use '{self.file.parent}': {error.strerror or error}") from error
        return held(self.lock)

    def answer(self, stage: Stage, request: Mapping[str, object]) -> Payload:
        """Answer a stage without training.

        Raises:
            FederationError: the request is malformed, out of turn, not as the approved study has it, or asks for what
                must not be revealed.
        """
        if stage is Stage.KEYS and self.approved is not None:
            check_setting(unpack(SecaggSetting, request), self.approved)
        fewest = self.site.policy.min_summed_sites
        state, answer = answer_stage(stage, self.site.site, request, self._load(), fewest, self.identity)
        self._store(state)
        return pack(answer)

    def open(self, request: Mapping[str, object], study_digest: str, round_number: int) -> None:
        """Open the shares that came with a training task; raises `FederationError`."""
        routed = unpack(RoutedShares, request)
        self._store(open_shares(begun(self._load()), routed, study_digest, round_number, self.identity))

    def mask(self, update: State, drift: Tensor | None, shape: str) -> Payload:
        """The update and the drift of this shape, quantised and masked.

        Raises:
            FederationError: out of turn, or sums of a longitudinal drift that are too large to travel.
        """
        before = begun(self._load())
        if shape == "longitudinal" and drift is not None:
            fits = float(drift.abs().max()) <= largest_drift(shape)
            require(fits, "the site's sums are too large for secure aggregation: it has too many visits")
        vector = flatten(update, drift, shape, before.setting)
        state, answer, _ = mask_update(before, vector)
        self._store(state)
        return pack(answer)

    def _load(self) -> SiteState | None:
        try:
            return SiteState.from_bytes(self.file.read_bytes()) if self.file.exists() else None
        except OSError as error:
            raise FederationError(f"cannot read '{self.file}': {error.strerror or error}") from error

    def _store(self, state: SiteState) -> None:
        write_bytes(self.file, state.to_bytes(), mode=0o600)


def check_setting(setting: SecaggSetting, study: StudyConfig) -> None:
    """Refuse a round whose setting is not the study's; raises `FederationError`."""
    federation = study.federation
    require(federation.secure_aggregation, "the approved study does not use secure aggregation: refused")
    require(setting.study == study.digest(), "the round is of another study than the approved one: refused")
    within = 1 <= setting.round <= federation.rounds
    require(within, f"round {setting.round} is not one of the study's {federation.rounds}: refused")
    known = setting.sites <= len(federation.sites)
    require(known, f"a round of {setting.sites} sites, the approved study has {len(federation.sites)}: refused")
    fewest = fewest_summed(setting.sites, federation)
    require(
        setting.threshold >= fewest, f"the threshold is {setting.threshold} sites, the study's is {fewest}: refused"
    )
    same = (setting.clip, setting.levels) == (federation.secure_clip, LEVELS)
    require(same, "the round's clipping range or number of levels is not the study's: refused")
