"""A site's secure aggregation over Flower's messages: which stage was asked, and the state between stages."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from ld_client.privacy.secagg import SiteState, answer_stage, begun, mask_update, open_shares
from ld_client.site_config import SiteConfig
from ld_common.core.state import State
from ld_common.protocol.secagg.messages import Payload, RoutedShares, Stage, drift_unit, flatten, pack, unpack

RECORD = "secure-aggregation"


class SecaggSiteRound:
    """One site's round; what it keeps lies in the node's own state, which Flower stores and never sends."""

    def __init__(self, kept: RecordDict) -> None:
        self.kept = kept

    def answer(self, site: SiteConfig, stage: Stage, request: Mapping[str, object]) -> Payload:
        """Answer a stage without training.

        Raises:
            FederationError: the request is malformed, out of turn or asks for what must not be revealed.
        """
        state, answer = answer_stage(stage, site.site, request, self._load(), site.policy.min_summed_sites)
        self._store(state)
        return pack(answer)

    def open(self, request: Mapping[str, object], study_digest: str, round_number: int) -> None:
        """Take the shares that came with a training task, before training; raises `FederationError`."""
        self._store(open_shares(begun(self._load()), unpack(RoutedShares, request), study_digest, round_number))

    def mask(self, update: State, drift: Tensor | None) -> Payload:
        """A trained update and the drift, quantised and masked; raises `FederationError`."""
        held = begun(self._load())
        vector = flatten(update, drift, drift_unit(held.setting.clip))
        state, answer, _ = mask_update(held, vector)
        self._store(state)
        return pack(answer)

    def _load(self) -> SiteState | None:
        record = self.kept.config_records.get(RECORD)
        return None if record is None else SiteState.from_bytes(bytes(record["state"]))  # type: ignore[arg-type]

    def _store(self, state: SiteState) -> None:
        self.kept[RECORD] = ConfigRecord({"state": state.to_bytes()})
