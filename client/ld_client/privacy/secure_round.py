"""A site's secure aggregation over Flower's messages: which stage was asked, and the state between stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from ld_client.privacy.secure_aggregation import (
    SiteState,
    deal_shares,
    mask_update,
    offer_keys,
    open_shares,
    reveal_shares,
)
from ld_client.site import SiteConfig
from ld_common.errors import FederationError
from ld_common.schemes import State
from ld_common.secure_aggregation import (
    Payload,
    Roster,
    RoutedShares,
    Setting,
    Stage,
    UnmaskRequest,
    drift_unit,
    flatten,
    pack,
    unpack,
)

RECORD = "secure-aggregation"


class SecureRound:
    """One site's round; what it keeps lies in the node's own state, which Flower stores and never sends."""

    def __init__(self, kept: RecordDict) -> None:
        self.kept = kept

    def answer(self, site: SiteConfig, stage: Stage, request: Mapping[str, object]) -> Payload:
        """Answer a stage without training.

        Raises:
            FederationError: the request is malformed, out of turn or asks for what must not be revealed.
        """
        answer: Any
        if stage is Stage.KEYS:
            fewest, previous = site.policy.min_summed_sites, self._load()
            state, answer = offer_keys(site.site, unpack(Setting, request), fewest, previous)
        elif stage is Stage.SHARES:
            state, answer = deal_shares(self._held(), unpack(Roster, request))
        else:
            state, answer = reveal_shares(self._held(), unpack(UnmaskRequest, request))
        self._store(state)
        return pack(answer)

    def open(self, request: Mapping[str, object], study_digest: str, round_number: int) -> None:
        """Take the shares that came with a training task, before training; raises `FederationError`."""
        self._store(open_shares(self._held(), unpack(RoutedShares, request), study_digest, round_number))

    def mask(self, update: State, drift: Tensor | None) -> Payload:
        """A trained update and the drift, quantised and masked; raises `FederationError`."""
        held = self._held()
        vector = flatten(update, drift, drift_unit(held.setting.clip))
        state, answer, _ = mask_update(held, vector)
        self._store(state)
        return pack(answer)

    def _held(self) -> SiteState:
        state = self._load()
        if state is None:
            raise FederationError("secure aggregation was asked to go on with a round that this site has not begun")
        return state

    def _load(self) -> SiteState | None:
        record = self.kept.config_records.get(RECORD)
        return None if record is None else SiteState.from_bytes(bytes(record["state"]))  # type: ignore[arg-type]

    def _store(self, state: SiteState) -> None:
        self.kept[RECORD] = ConfigRecord({"state": state.to_bytes()})
