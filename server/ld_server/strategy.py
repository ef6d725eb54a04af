"""The Flower strategy: selects sites by name, checks every result, aggregates, writes checkpoints."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ld_common.core.config import to_mapping
from ld_common.core.errors import CheckpointError, FederationError, LdError
from ld_common.core.state import State, Tensors
from ld_common.protocol import messages
from ld_common.protocol.messages import TrainResult, TrainTask
from ld_common.protocol.secagg.identities import Peers
from ld_common.protocol.study_config import BEST, StudyConfig
from ld_common.protocol.wire_formats import decode_state
from ld_server.aggregation import (
    Aggregate,
    Mean,
    check_aggregation,
    check_result,
    clip_update,
    combine_states,
    site_weights,
)
from ld_server.checkpoint import Checkpoint, write_best, write_checkpoint
from ld_server.drift_collection import DriftCollection
from ld_server.node_registry import Admission, PresentNodes
from ld_server.reply_validation import max_reply_bytes, read_reply, reason, summary
from ld_server.round_log import RoundRecord
from ld_server.round_starts import RoundStarts
from ld_server.running_mean import RunningMean, running_mean
from ld_server.secagg_round import SecaggServerRound
from ld_server.stored_states import RoundFolder, stored_state
from ld_server.validation import Validation, best_round, is_due, is_over

POLL_SECONDS = 1.0


class DriftFederation(Strategy):
    """Federated averaging of an adapter, with a latent drift a site.

    A site without a valid result is left out of the round, with the reason in the round's record; the run continues.
    With fewer than `min_train_nodes` valid results the adapter stays unchanged.
    """

    def __init__(
        self,
        study: StudyConfig,
        base_digest: str,
        modality_digest: str,
        drifts: DriftCollection,
        output: Path,
        on_round: Callable[[RoundRecord], None] = lambda record: None,
        admission: Admission | None = None,
    ) -> None:
        self.study, self.aggregator = study, check_aggregation(study)
        self.drifts = drifts
        self.base_digest, self.modality_digest = base_digest, modality_digest
        self.output = output
        self.on_round = on_round
        self.admission = admission or Admission()
        self.records: list[RoundRecord] = []
        self.state: State = {}
        """The adapter's trainable part, set before the first round."""
        self.frozen: State = {}
        """The adapter's frozen part, where sites cannot draw it from the study's seed."""
        self.carried: State = {}
        """Factors that sites add to the base's weights."""
        self.own_parts: dict[str, State] = {}
        """Of a study that leaves factors at the sites, those of the sites that let them be released."""
        self.released_round: int | None = None
        """The round whose state is released, where it is not the last."""
        self._memory: State = {}
        """The aggregator's own."""
        self._rounds_before = 0
        """Rounds of earlier runs of the study; Flower counts from 1 in each run."""
        self._secure: SecaggServerRound | None = None
        self._failure = ""
        self._present = PresentNodes({})
        self._tasks: dict[str, TrainTask] = {}
        self._asked: dict[str, Message] = {}
        self._replies, self._starts = RoundFolder(output), RoundStarts(study, {}, 0)
        self._validation, self._to_forget = Validation(study, self.admission), list[Message]()
        self._mean: RunningMean | None = None
        self._most_bytes = 0
        self._sent_as_bytes = False
        self._started = 0.0

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue after a checkpoint's round; the caller has checked that it is of this study."""
        self._rounds_before, self.state, self.frozen = checkpoint.round, checkpoint.state, checkpoint.frozen
        self.carried, self._memory = checkpoint.carried, checkpoint.memory
        self.own_parts = checkpoint.own_parts
        self.records = [RoundRecord(**record) for record in checkpoint.records]
        self.drifts.collected = checkpoint.drifts

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One task for each connected site of the study, in the order of their names.

        Flower's `arrays` are not used: a copy of `state` would stay in memory during the round.
        """
        self._tasks, self._asked = {}, {}
        if is_over(self.records, self.study.federation):
            return []
        self._started = time.monotonic()
        self._failure, self._secure = "", None
        self._sent_as_bytes = bool(getattr(grid, "sends_bytes", False))
        number = self._rounds_before + server_round
        self._present = PresentNodes({})
        try:
            self._present = self._wait_for_sites(grid, number)
            self._require_enough(self._present)
        except LdError as error:
            if not any(record.counted for record in self.records[self._rounds_before :]):
                raise  # this run has no result to lose
            self._failure = str(error)
        self._tasks = {} if self._failure else self._make_tasks(number, grid)
        # a node that comes back after the round's deadline drops the task
        lifetime = self.study.federation.round_timeout_seconds
        self._asked = {
            name: Message(
                content,
                dst_node_id=self._present.nodes[name],
                message_type=MessageType.TRAIN,
                ttl=lifetime,
            )
            for name, content in messages.pack_tasks(self._tasks).items()
        }
        return list(self._asked.values())

    def _make_tasks(self, number: int, grid: Grid) -> dict[str, TrainTask]:
        """Each site's task, in the order of their names; none for a round that cannot count."""
        self._starts = RoundStarts(self.study, self.state, number)
        connected = sorted(self._present.nodes)
        tasks = self._common_tasks(number, connected)
        if self.study.federation.secure_aggregation:
            keys = self.admission.signing_keys
            peers = None if keys is None else Peers(keys())
            expected = self._starts.expected()
            self._secure = SecaggServerRound(self.study, number, expected, self.drifts.form, grid, peers)
            try:
                secured = self._secure.begin({name: self._present.nodes[name] for name in connected})
            except FederationError as error:
                self._failure = str(error)
                return {}
            tasks = {name: replace(tasks[name], secure=request) for name, request in secured.items()}
        return {name: self.admission.prepare(name, task, self._last_entry(name)) for name, task in tasks.items()}

    def _common_tasks(self, number: int, sites: Iterable[str], drift: State | None = None) -> dict[str, TrainTask]:
        """What sites get of the study's present state; sites of the same rank share theirs."""
        common = TrainTask(
            self.state,
            number,
            json.dumps(to_mapping(self.study)),
            self.base_digest,
            self.modality_digest,
            frozen=self.frozen,
            basis=self.drifts.collected.basis,
            carried=self.carried,
            drift=drift or {},
        )
        starts = RoundStarts(self.study, self.state, number)
        return {site: replace(common, state=starts.state(site)) for site in sites}

    def _last_entry(self, site: str) -> dict[str, Any] | None:
        return next((record.sites[site] for record in reversed(self.records) if site in record.sites), None)

    def _wait_for_sites(self, grid: Grid, number: int) -> PresentNodes:
        """The study's connected sites, when all are or the wait is over; raises `LdError`."""
        federation, printed = self.study.federation, False
        deadline = time.monotonic() + federation.wait_seconds
        while True:
            present = self.admission.identify(grid)
            nodes = {name: present.nodes[name] for name in sorted(federation.sites) if name in present.nodes}
            absent = sorted(set(federation.sites) - set(nodes))
            left = deadline - time.monotonic()
            if not absent or left <= 0:
                break
            if not printed:
                print(f"round {number}: waits up to {left:.0f} s for {', '.join(absent)}", flush=True)
                printed = True
            time.sleep(min(POLL_SECONDS, left))
        return PresentNodes(nodes, present.unknown_nodes)

    def _require_enough(self, present: PresentNodes) -> None:
        federation = self.study.federation
        if len(present.nodes) < federation.min_train_nodes:
            absent = sorted(set(federation.sites) - set(present.nodes))
            raise FederationError(
                f"only {len(present.nodes)} of at least {federation.min_train_nodes} sites connected within "
                f"{federation.wait_seconds:g} s; missing: {', '.join(absent)}"
            )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the results as they come, aggregate the valid ones, write the checkpoint."""
        if is_over(self.records, self.study.federation):
            return None, None
        try:
            return self._aggregate(server_round, replies)
        finally:
            self._replies.clear()

    def _aggregate(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        record = RoundRecord(self._rounds_before + server_round, unknown_nodes=self._present.unknown_nodes)
        results: dict[str, TrainResult] = {}
        # by message, not by source: the SuperLink replies for a node that died
        asked = set(self._asked)
        waiting = {message.metadata.message_id: name for name, message in self._asked.items()}
        if self._sent_as_bytes:
            for message in self._asked.values():
                _forget(message)
        self._asked.clear()
        self._replies.clear()
        self._most_bytes = max_reply_bytes(self.state, self.drifts.form)
        self._mean = running_mean(self._starts.flat(), self.study.federation, self.aggregator)
        for reply in replies:
            name = waiting.pop(reply.metadata.reply_to_message_id, None)
            try:
                if name is not None:
                    results[name], record.sites[name] = self._accept(reply, name)
            except CheckpointError:
                raise  # this machine's disk, not the site
            except LdError as error:
                record.left_out[str(name)] = reason(error)
            except Exception as error:  # a node can send anything
                record.left_out[str(name)] = f"its reply cannot be read ({type(error).__name__})"
            _forget(reply)
            del reply  # else it stays in memory while the next one is pulled
        for name in set(self.study.federation.sites) - asked:
            connected = name in self._present.nodes
            record.left_out[name] = "it was given no task" if connected else "it was not connected"
        record.left_out |= {name: "it did not reply before the round's deadline" for name in waiting.values()}
        if self._failure:
            record.failure, record.sites = self._failure, {}
        elif self._secure is not None:
            self._sum(record, self._secure)
        else:
            self._average(record, results)
        if self._secure is not None:
            record.left_out |= self._secure.left_out
        if record.counted:
            self._take_own({name: results[name].own for name in record.sites})
        return self._finish(record)

    def _take_own(self, sent: dict[str, State]) -> None:
        """Take the factors of sites that release them, and forget those of sites that no longer do."""
        self.own_parts = {name: own for name, own in {**self.own_parts, **sent}.items() if own}

    def _accept(self, reply: Message, name: str) -> tuple[TrainResult, dict[str, Any]]:
        """A site's checked result, and what the record keeps of it; raises `LdError`."""
        federation, task = self.study.federation, self._tasks[name]
        result = read_reply(reply, name, task, self.study, self._most_bytes, stored_state)
        norm = None
        if result.secure is None:
            expected, flat = self._starts.expected(name), self._starts.flat(name)
            decoded = replace(result, state=decode_state(federation.wire, result.state, expected))
            norm = check_result(decoded, expected, self.drifts.form, federation.max_update_norm, flat)
        entry = summary(result, norm, federation.clip_update_norm)
        for check in self.admission.checks:
            entry |= check(name, task, result)
        if result.secure is not None and self._secure is not None:
            self._secure.take(name, result.secure)
            return replace(result, secure=None), entry  # it is in the sum
        return replace(result, state=self._take(name, result.state, norm or 0.0)), entry

    def _take(self, name: str, sent: Tensors, norm: float) -> Tensors:
        """Clip a checked state, and add it to the running mean or keep it; returns what is left to aggregate."""
        federation, expected = self.study.federation, self._starts.expected(name)
        kept = sent if self._mean is not None else self._replies.keep(name, sent)
        state = decode_state(federation.wire, kept, expected)
        state = clip_update(state, expected, federation.clip_update_norm, norm)
        if self._mean is None:
            return state
        self._mean.add(state)
        return {}

    def _sum(self, record: RoundRecord, secure: SecaggServerRound) -> None:
        """Take the mean of a secure sum."""
        try:
            mean = secure.finish()
        except FederationError as error:
            record.failure, record.sites = str(error), {}
            return
        self._step(record, mean.state)
        record.mean_update_norm = mean.norm
        self.drifts.add_mean(mean.drift)
        record.sites = {name: record.sites[name] for name in mean.sites}

    def _average(self, record: RoundRecord, results: dict[str, TrainResult]) -> None:
        federation = self.study.federation
        if len(results) < federation.min_train_nodes:
            record.failure = f"{len(results)} valid results, federation.min_train_nodes is {federation.min_train_nodes}"
            return
        visits = {name: None if result.numbers is None else result.numbers.visits for name, result in results.items()}
        weights = site_weights(visits, federation)
        if self._mean is None:
            states = {name: result.state for name, result in results.items()}
            before, number = self._before(), record.round
            self._take_over(record, combine_states(states, weights, self.aggregator, before, number))
        else:
            self._step(record, self._mean.mean())
        self.drifts.add({name: result.drift for name, result in results.items() if result.drift is not None}, weights)

    def _before(self) -> Aggregate:
        return Aggregate(self._starts.expected(), self.carried, self._memory)

    def _step(self, record: RoundRecord, mean: State) -> None:
        """Take what an aggregator of means makes of the mean."""
        assert isinstance(self.aggregator, Mean)
        self._take_over(record, self.aggregator.step(mean, self._before(), record.round))

    def _take_over(self, record: RoundRecord, after: Aggregate) -> None:
        record.counted = True
        self.state = {**self.state, **after.state}
        self.carried, self._memory = after.carried, after.memory

    def _finish(self, record: RoundRecord) -> tuple[ArrayRecord | None, MetricRecord | None]:
        record.sites = dict(sorted(record.sites.items()))
        record.left_out = dict(sorted(record.left_out.items()))
        record.ended = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record.seconds = time.monotonic() - self._started
        self.records.append(record)
        write_checkpoint(self.output, self._checkpoint())
        if not self._is_validated(record.round):
            self.on_round(record)
        if not record.counted:
            return None, None
        losses = {
            f"loss-{name}": site["loss_last"] for name, site in record.sites.items() if site["loss_last"] is not None
        }
        return None, MetricRecord(losses)

    def _checkpoint(self) -> Checkpoint:
        """The study's state after its last round."""
        return Checkpoint(
            study_digest=self.study.digest(),
            base_digest=self.base_digest,
            modality_digest=self.modality_digest,
            round=self.records[-1].round,
            state=self.state,
            records=[vars(entry) for entry in self.records],
            drifts=self.drifts.collected,
            frozen=self.frozen,
            carried=self.carried,
            memory=self._memory,
            own_parts=self.own_parts,
        )

    def _is_validated(self, number: int) -> bool:
        """Whether the last round is this one, counted, and is to be scored."""
        last = self.records[-1] if self.records else RoundRecord(0)
        return last.round == number and last.counted and is_due(self.study, number)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the round's sites to score the new adapter; nothing where `federation.validate_every` skips the round."""
        number = self._rounds_before + server_round
        if not self._is_validated(number):
            return []
        asked = self._ask_for_scores()
        self._to_forget = asked if self._sent_as_bytes else []
        return asked

    def _ask_for_scores(self) -> list[Message]:
        drift, record = self.drifts.scored(), self.records[-1]
        present = [name for name in record.sites if name in self._present.nodes]
        tasks = self._common_tasks(record.round, present, None if drift is None else drift.state())
        return self._validation.ask(tasks, self._present.nodes, record)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Take the sites' scores; the best round so far is kept where the study releases it."""
        if not self._is_validated(self._rounds_before + server_round):
            return None
        for message in self._to_forget:
            _forget(message)
        record = self.records[-1]
        self._validation.take(replies, record)
        record.seconds = time.monotonic() - self._started
        self._keep_scores()
        self.on_round(record)
        return MetricRecord(record.validation_mean) if record.validation_mean else None

    def _keep_scores(self) -> None:
        checkpoint = self._checkpoint()
        write_checkpoint(self.output, checkpoint)
        if self.study.federation.keep == BEST and best_round(self.records) is self.records[-1]:
            write_best(self.output, checkpoint)

    def score_restored(self, grid: Grid) -> None:
        """Validate the last round of a restored run, where the server ended before its sites had."""
        last = self.records[-1]
        if not self._is_validated(last.round) or last.validation or last.not_validated:
            return
        self._present = self._wait_for_sites(grid, last.round)
        asked = self._ask_for_scores()
        self._validation.take(grid.send_and_receive(asked, timeout=self.study.federation.round_timeout_seconds), last)
        self._keep_scores()

    def summary(self) -> None:
        """Print what will run."""
        federation, done = self.study.federation, self._rounds_before
        after = f", {done} of them done" if done else ""
        print(
            f"study {self.study.name}: {federation.rounds} rounds{after} at {', '.join(federation.sites)}", flush=True
        )


def _forget(message: Message) -> None:
    """Free a message's tensors: Flower's records refer to themselves, and Python would find that out much later."""
    if message.has_content():
        for record in message.content.array_records.values():
            record.clear()
