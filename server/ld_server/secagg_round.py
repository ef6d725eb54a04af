"""Secure aggregation of one round over Flower's grid: from the connected sites to their mean update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from ld_common.adapters.state_dict import update_norm
from ld_common.core.errors import FederationError
from ld_common.core.state import State
from ld_common.protocol import messages
from ld_common.protocol.secagg.identities import Peers
from ld_common.protocol.secagg.messages import (
    Payload,
    SecaggSetting,
    Stage,
    drift_numbers,
    fewest_summed,
    restore,
)
from ld_common.protocol.study_config import StudyConfig
from ld_server.drift_form import DriftForm
from ld_server.secagg import SecureAggregation

STAGE_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class MeanUpdate:
    """The result of a round, which is all that the server learns."""

    state: State
    """The adapter with the sites' mean update."""
    drift: Tensor | None
    """The sites' mean drift, float64."""
    sites: list[str]
    """The sites in the sum."""
    norm: float
    """L2 norm of the mean update."""


class SecaggServerRound:
    """One round: `begin` before the sites train, `take` for each answer, `finish` after the last."""

    def __init__(
        self,
        study: StudyConfig,
        server_round: int,
        state: State,
        form: DriftForm | None,
        grid: Grid,
        peers: Peers | None = None,
    ) -> None:
        self.peers = peers
        self.study, self.round, self.state, self.form, self.grid = study, server_round, state, form, grid
        self.left_out: dict[str, str] = {}
        self._nodes: dict[str, int] = {}
        self._aggregation: SecureAggregation | None = None

    def begin(self, nodes: dict[str, int]) -> dict[str, Payload]:
        """Stages `keys` and `shares` with the sites at these nodes; returns a request for each site's task.

        Raises:
            FederationError: too few sites are connected or remain.
        """
        federation, count = self.study.federation, len(nodes)
        threshold = fewest_summed(count, federation)
        length = sum(value.numel() for value in self.state.values())
        length += 0 if self.form is None else drift_numbers(math.prod(self.form.shape), self.study.drift.shape)
        if count < threshold:
            raise FederationError(f"{count} sites are connected, a secure sum needs {threshold}")
        setting = SecaggSetting(self.study.digest(), self.round, count, threshold, length, federation.secure_clip)
        self._nodes, self._aggregation = nodes, SecureAggregation(setting, list(nodes), self.peers)
        try:
            return self._aggregation.agree(self._exchange)
        finally:
            self.left_out |= self._aggregation.left_out

    def take(self, site: str, answer: Payload) -> None:
        """Stage `vector`: add a site's answer, which came with its training; raises `FederationError` if it cannot."""
        self._begun().take(site, answer)

    def finish(self) -> MeanUpdate:
        """Stage `unmask`, after the last answer.

        Raises:
            FederationError: too few answers, or a sum that is inconsistent or too large.
        """
        aggregation = self._begun()
        try:
            aggregation.end_collection()
            total = aggregation.unmask(self._exchange)
        finally:
            self.left_out |= aggregation.left_out
        shape = None if self.form is None else self.form.shape
        mean = total.vector / len(total.sites)
        update, drift = restore(mean, self.state, shape, self.study.drift.shape, aggregation.setting)
        state = {name: (self.state[name].double() + value).float() for name, value in update.items()}
        norm, limit = update_norm(state, self.state), self.study.federation.max_update_norm
        if norm > limit:
            raise FederationError(
                f"the mean update has norm {norm:.3g}, more than federation.max_update_norm {limit:g}"
            )
        if drift is not None and self.form is not None and float(drift.abs().max()) > self.form.largest:
            raise FederationError(f"the mean drift reaches {float(drift.abs().max()):.3g}, above {self.form.largest:g}")
        return MeanUpdate(state, drift, list(total.sites), norm)

    def _begun(self) -> SecureAggregation:
        if self._aggregation is None:
            raise FederationError("no site has begun the round")
        return self._aggregation

    def _exchange(self, stage: Stage, requests: dict[str, Payload]) -> dict[str, Mapping[str, object]]:
        """Send requests and return the payloads that came; a failing site has none."""
        queries = [
            Message(messages.pack_secure(request), dst_node_id=self._nodes[site], message_type=f"query.{stage.value}")
            for site, request in requests.items()
        ]
        replies = list(self.grid.send_and_receive(queries, timeout=STAGE_TIMEOUT_SECONDS))
        names = {message.metadata.message_id: site for message, site in zip(queries, requests, strict=True)}
        answers: dict[str, Mapping[str, object]] = {}
        for reply in replies:
            site = names.get(reply.metadata.reply_to_message_id)
            payload = messages.unpack_secure(reply.content) if reply.has_content() else None
            if site is not None and payload is not None:
                answers[site] = payload
        return answers
