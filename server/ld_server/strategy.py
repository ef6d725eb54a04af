"""The round as a Flower strategy: picks sites by name, checks every answer, averages, checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from ld_common import messages
from ld_common.config import to_mapping
from ld_common.drift import by_channel, mean_drift
from ld_common.errors import AdapterError, FederationError, LdError
from ld_common.messages import TrainResult, TrainTask
from ld_common.schemes import State
from ld_common.study import StudyConfig
from ld_server.aggregate import average_states, check_result
from ld_server.checkpoint import Checkpoint, write_checkpoint
from ld_server.secure_round import SecureRound

POLL_SECONDS = 1.0
JOIN_TIMEOUT_SECONDS = 60.0


@dataclass
class RoundRecord:
    """What happened in one round, as checkpoint, release and report keep it."""

    round: int
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Site -> why its answer did not count."""
    counted: bool = False
    """Whether enough answers passed the checks for the round to change the adapter."""
    failure: str = ""
    """Why a secure sum could not be made; it has no one site to blame."""
    mean_update_norm: float | None = None
    """L2 norm of the sites' mean update, where it is all that the server knows."""
    seconds: float = 0.0


class DriftFederation(Strategy):
    """Federated averaging of a named set of tensors, each site with a latent drift of its own.

    A bad or missing answer leaves its site out of the round, with the reason in the round's record; it never
    ends the run. Below `min_sites` good answers the adapter stays as it was.
    """

    def __init__(
        self,
        study: StudyConfig,
        base_digest: str,
        modality_digest: str,
        drift_shape: torch.Size | None,
        output: Path,
        on_round: Callable[[RoundRecord], None] = lambda record: None,
    ) -> None:
        self.study = study
        self.base_digest, self.modality_digest = base_digest, modality_digest
        self.drift_shape = drift_shape
        self.output = output
        self.on_round = on_round
        self.records: list[RoundRecord] = []
        self.site_drifts: dict[str, Tensor] = {}
        self.site_weights: dict[str, float] = {}
        self.state: State = {}
        self._secure: SecureRound | None = None
        self._mean_drift: Tensor | None = None
        self._failure = ""
        self._nodes: dict[str, int] = {}
        self._asked: dict[str, Message] = {}
        self._started = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One task for each site of the study that is here, in the order of their names."""
        self._started = time.monotonic()
        self.state = dict(arrays.to_torch_state_dict())
        self._find_sites(grid)
        task = TrainTask(
            self.state, server_round, json.dumps(to_mapping(self.study)), self.base_digest, self.modality_digest
        )
        present = sorted(set(self._nodes) & set(self.study.federation.sites))
        tasks = dict.fromkeys(present, task)
        if self.study.federation.secure_aggregation:
            tasks = self._secured(task, {name: self._nodes[name] for name in present}, grid)
        self._asked = {
            name: Message(messages.pack_task(own), dst_node_id=self._nodes[name], message_type=MessageType.TRAIN)
            for name, own in tasks.items()
        }
        return list(self._asked.values())

    def _secured(self, task: TrainTask, nodes: dict[str, int], grid: Grid) -> dict[str, TrainTask]:
        """Each site's task with its part in the round's secure aggregation; none when too few sites take part."""
        self._failure = ""
        self._secure = SecureRound(self.study, task.round, self.state, self.drift_shape, grid)
        try:
            return {name: replace(task, secure=request) for name, request in self._secure.begin(nodes).items()}
        except FederationError as error:
            self._failure = str(error)
            return {}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the answers, average the good ones, write the checkpoint."""
        record = RoundRecord(server_round)
        results: dict[str, TrainResult] = {}
        # by message, not by source: the answer for a node that died comes from the SuperLink
        waiting = {message.metadata.message_id: name for name, message in self._asked.items()}
        for reply in replies:
            name = waiting.pop(reply.metadata.reply_to_message_id, None)
            if name is None:
                continue
            try:
                result = self._read(reply, name, server_round)
                norm = None
                if result.secure is None:
                    norm = check_result(result, self.state, self.drift_shape, self.study.federation.max_update_norm)
            except LdError as error:
                record.left_out[name] = str(error)
                continue
            results[name] = result
            record.sites[name] = _summary(result, norm)
        record.left_out |= {name: "it did not answer before the round's deadline" for name in waiting.values()}
        absent = set(self.study.federation.sites) - set(self._asked)
        record.left_out |= {name: "it was not connected" for name in absent}
        if self._secure is not None:
            self._sum(record, results, self._secure)
        else:
            record.counted = len(results) >= self.study.federation.min_sites
            if record.counted:
                self._average(results)
        return self._finish(record)

    def _sum(self, record: RoundRecord, results: dict[str, TrainResult], secure: SecureRound) -> None:
        """Take over the secure mean of the sites that are in it."""
        try:
            if self._failure:
                raise FederationError(self._failure)
            found = secure.finish({name: result.secure for name, result in results.items() if result.secure})
        except FederationError as error:
            record.failure, record.sites = str(error), {}
        else:
            record.counted = True
            record.mean_update_norm = found.norm
            self.state, self._mean_drift = found.state, found.drift
            record.sites = {name: record.sites[name] for name in found.sites}
        record.left_out |= secure.left_out

    def _average(self, results: dict[str, TrainResult]) -> None:
        equal = self.study.federation.weighting == "equal"
        weights = {
            name: 1.0 if equal or result.numbers is None else float(result.numbers.visits)
            for name, result in results.items()
        }
        self.state = average_states({name: result.state for name, result in results.items()}, weights)
        for name, result in results.items():
            self.site_weights[name] = weights[name]
            if result.drift is not None:
                self.site_drifts[name] = result.drift

    def _finish(self, record: RoundRecord) -> tuple[ArrayRecord | None, MetricRecord | None]:
        record.sites = dict(sorted(record.sites.items()))
        record.left_out = dict(sorted(record.left_out.items()))
        record.seconds = time.monotonic() - self._started
        self.records.append(record)
        write_checkpoint(
            self.output,
            Checkpoint(self.study.digest(), record.round, self.state, [vars(kept) for kept in self.records]),
        )
        self.on_round(record)
        if not record.counted:
            return None, None
        known = {name: site["loss_last"] for name, site in record.sites.items() if site["loss_last"] is not None}
        losses = {f"loss-{name}": loss for name, loss in known.items()}
        return ArrayRecord(dict(self.state)), MetricRecord(losses)

    @property
    def drift(self) -> Tensor | None:
        """Mean drift μ over the sites that released one, by their weights in the average, or of the secure sum."""
        if self._secure is not None:
            return self._mean_drift
        names = sorted(self.site_drifts)
        return mean_drift([self.site_drifts[name] for name in names], [self.site_weights[name] for name in names])

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: the release is evaluated where the evaluation data lie."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing to aggregate."""
        return None

    def summary(self) -> None:
        """Say what will run, once."""
        federation = self.study.federation
        print(f"study {self.study.name}: {federation.rounds} rounds at {', '.join(federation.sites)}", flush=True)

    def _find_sites(self, grid: Grid) -> None:
        """Ask every new node for its site's name until all sites are here or the wait is over.

        Raises:
            FederationError: too few sites came and there is nothing yet to lose; later rounds go on without.
        """
        wanted, federation = set(self.study.federation.sites), self.study.federation
        deadline = time.monotonic() + federation.wait_seconds
        known: set[int] = set()
        while True:
            nodes = set(grid.get_node_ids())
            self._nodes = {name: node for name, node in self._nodes.items() if node in nodes}
            new = sorted(nodes - known - set(self._nodes.values()))
            asked = [Message(RecordDict(), dst_node_id=node, message_type=f"query.{messages.JOIN}") for node in new]
            for reply in grid.send_and_receive(asked, timeout=JOIN_TIMEOUT_SECONDS) if asked else []:
                name = messages.unpack_name(reply.content) if reply.has_content() else None
                if name is not None:
                    known.add(reply.metadata.src_node_id)
                if name in wanted:
                    self._nodes.setdefault(name, reply.metadata.src_node_id)
            absent = sorted(wanted - set(self._nodes))
            if not absent:
                return
            if time.monotonic() >= deadline:
                break
            time.sleep(POLL_SECONDS)
        if len(self._nodes) < federation.min_sites and not any(record.counted for record in self.records):
            raise FederationError(
                f"only {len(self._nodes)} of {federation.min_sites} sites came within "
                f"{federation.wait_seconds:g} s; missing: {', '.join(absent)}"
            )

    def _read(self, reply: Message, name: str, server_round: int) -> TrainResult:
        if reply.has_error():
            raise AdapterError(f"its node failed with code {reply.error.code}")
        if (sentence := messages.unpack_error(reply.content)) is not None:
            raise AdapterError(sentence)
        try:
            result = messages.unpack_result(reply.content)
        except Exception as error:  # whatever a foreign node put into a message, the run goes on
            raise AdapterError(f"its answer cannot be read ({type(error).__name__})") from error
        if (result.site, result.round) != (name, server_round):
            raise AdapterError(f"its answer is of site '{result.site}' and round {result.round}")
        withheld = result.numbers is None, result.secure is not None
        if withheld != (self.study.withholds_numbers, self.study.federation.secure_aggregation):
            raise AdapterError("it does not hold just what the study lets leave")
        return result


def _summary(result: TrainResult, norm: float | None) -> dict[str, Any]:
    withheld = dict.fromkeys(("visits", "patients", "loss_first", "loss_last", "seconds"))
    return {
        **(withheld if result.numbers is None else vars(result.numbers)),
        "update_norm": norm,
        "uplink_bytes": result.uplink_bytes,
        "drift": None if result.drift is None else by_channel(result.drift),
    }
