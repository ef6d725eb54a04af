"""A site's secure aggregation over Flower's messages, with its state between stages."""

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
    """One site's round; its state is in the node's context, which Flower stores and never sends."""

    def __init__(self, context_state: RecordDict) -> None:
        self.context_state = context_state

    def answer(self, site: SiteConfig, stage: Stage, request: Mapping[str, object]) -> Payload:
        """Answer a stage without training.

        Raises:
            FederationError: the request is malformed, out of turn or asks for what must not be revealed.
        """
        state, answer = answer_stage(stage, site.site, request, self._load(), site.policy.min_summed_sites)
        self._store(state)
        return pack(answer)

    def open(self, request: Mapping[str, object], study_digest: str, round_number: int) -> None:
        """Open the shares that came with a training task; raises `FederationError`."""
        self._store(open_shares(begun(self._load()), unpack(RoutedShares, request), study_digest, round_number))

    def mask(self, update: State, drift: Tensor | None) -> Payload:
        """The update and the drift, quantised and masked; raises `FederationError`."""
        before = begun(self._load())
        vector = flatten(update, drift, drift_unit(before.setting.clip))
        state, answer, _ = mask_update(before, vector)
        self._store(state)
        return pack(answer)

    def _load(self) -> SiteState | None:
        record = self.context_state.config_records.get(RECORD)
        return None if record is None else SiteState.from_bytes(bytes(record["state"]))  # type: ignore[arg-type]

    def _store(self, state: SiteState) -> None:
        self.context_state[RECORD] = ConfigRecord({"state": state.to_bytes()})
