"""Validation at the sites: the adapter of a round, scored on each site's held-out patients.

A site's scores are its own word, which nobody can check: they decide which round is released (`federation.keep`) and
when a study ends (`federation.patience`), and change no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from flwr.app import Message, MessageType

from ld_common.core.errors import AdapterError, LdError
from ld_common.protocol import messages
from ld_common.protocol.messages import LOSS, MOST_SCORES, SCORED_VISITS, TrainResult, TrainTask
from ld_common.protocol.study_config import FederationConfig, StudyConfig
from ld_server.aggregation import site_weights
from ld_server.node_registry import Admission
from ld_server.reply_validation import content_bytes, reason
from ld_server.round_log import RoundRecord

MAX_REPLY_BYTES = 2**16
HOLDS_OUT_NONE = messages.ERROR_SENTENCES["held_out"]


def is_due(study: StudyConfig, round_number: int) -> bool:
    """Whether sites validate after this round."""
    federation = study.federation
    if not study.validates:
        return False
    return round_number % federation.validate_every == 0 or round_number == federation.rounds


class Validation:
    """Asks the sites of a round for scores, and puts what they say into the round's record."""

    def __init__(self, study: StudyConfig, admission: Admission) -> None:
        self._study, self._admission = study, admission
        self._tasks: dict[str, TrainTask] = {}
        self._asked: dict[str, Message] = {}
        self._without_held_out: set[str] = set()
        """Sites that said so in this run: they are not asked again."""

    def ask(self, tasks: Mapping[str, TrainTask], nodes: Mapping[str, int], record: RoundRecord) -> list[Message]:
        """A message for each site that may hold patients out.

        Args:
            tasks: of the round's sites, with the new adapter.
            nodes: their nodes.
            record: the round's, with the sites' last entries.
        """
        self._tasks = {
            site: self._admission.prepare(site, task, record.sites.get(site))
            for site, task in tasks.items()
            if site not in self._without_held_out
        }
        lifetime = self._study.federation.round_timeout_seconds
        self._asked = {
            site: Message(content, dst_node_id=nodes[site], message_type=MessageType.EVALUATE, ttl=lifetime)
            for site, content in messages.pack_tasks(self._tasks).items()
        }
        return list(self._asked.values())

    def take(self, replies: Iterable[Message], record: RoundRecord) -> None:
        """Complete a round's record by what came; a site without scores is a line in it."""
        record.not_validated = dict.fromkeys(self._without_held_out & set(record.sites), HOLDS_OUT_NONE)
        waiting = {message.metadata.message_id: site for site, message in self._asked.items()}
        self._asked.clear()
        for reply in replies:
            site = waiting.pop(reply.metadata.reply_to_message_id, None)
            if site is not None:
                self._take(reply, site, record)
        record.not_validated |= dict.fromkeys(waiting.values(), "it did not reply before the round's deadline")
        known = {*record.validation, *record.not_validated}
        record.not_validated |= dict.fromkeys(set(record.sites) - known, "it was not connected")
        record.validation = dict(sorted(record.validation.items()))
        record.not_validated = dict(sorted(record.not_validated.items()))
        record.validation_mean = mean_scores(record.validation, self._study.federation)

    def _take(self, reply: Message, site: str, record: RoundRecord) -> None:
        try:
            result = read_scores(reply, site, self._tasks[site])
            for check in self._admission.checks:
                record.sites[site] |= check(site, self._tasks[site], result)
            record.validation[site] = dict(sorted((result.scores or {}).items()))
        except LdError as error:
            record.not_validated[site] = reason(error)
            if reply.has_content() and messages.unpack_error(reply.content) == HOLDS_OUT_NONE:
                self._without_held_out.add(site)
        except Exception as error:  # a node can send anything
            record.not_validated[site] = f"its reply cannot be read ({type(error).__name__})"


def read_scores(reply: Message, site: str, task: TrainTask) -> TrainResult:
    """A site's scores, checked but for its signature.

    Raises:
        AdapterError: an error, too many bytes, another site or round, or what is no score.
        Exception: of any kind, when it cannot be decoded.
    """
    if reply.has_error():
        raise AdapterError(f"its node failed with code {reply.error.code}")
    if content_bytes(reply.content) > MAX_REPLY_BYTES:
        raise AdapterError("its reply to a validation is too large")
    if (sentence := messages.unpack_error(reply.content)) is not None:
        raise AdapterError(sentence)
    result = messages.unpack_result(reply.content)
    if (result.site, result.round) != (site, task.round):
        raise AdapterError(f"its reply is of site '{result.site}' and round {result.round}")
    scores = result.scores
    if scores is None or result.state or result.drift is not None or result.numbers is not None:
        raise AdapterError("its reply does not hold exactly the scores of a validation")
    fits = {LOSS, SCORED_VISITS} <= set(scores) and len(scores) <= MOST_SCORES
    if not fits or not all(map(math.isfinite, scores.values())) or scores[SCORED_VISITS] < 1:
        raise AdapterError("its scores lack one, or hold NaN or infinite values")
    return result


def mean_scores(scores: Mapping[str, Mapping[str, float]], federation: FederationConfig) -> dict[str, float]:
    """Each score's mean over the sites that have it, weighted as the sites' updates are; visits are added up."""
    if not scores:
        return {}
    counts = {site: int(values[SCORED_VISITS]) for site, values in scores.items()}
    weights = site_weights(counts, federation)
    means: dict[str, float] = {SCORED_VISITS: float(sum(counts.values()))}
    for name in sorted({name for values in scores.values() for name in values} - {SCORED_VISITS}):
        having = sorted(site for site, values in scores.items() if name in values)
        total = sum(weights[site] for site in having)
        means[name] = sum(weights[site] * scores[site][name] for site in having) / total
    return means


def best_round(records: Sequence[RoundRecord]) -> RoundRecord | None:
    """The record of the lowest mean validation loss, the earlier one of equal ones; None where none was validated."""
    scored = [record for record in records if LOSS in record.validation_mean]
    return min(scored, key=lambda record: record.validation_mean[LOSS], default=None)


def is_over(records: Sequence[RoundRecord], federation: FederationConfig) -> bool:
    """Whether `federation.patience` validations after the best one brought no better one."""
    best = best_round(records)
    if not federation.patience or best is None:
        return False
    later = [record for record in records if record.round > best.round and LOSS in record.validation_mean]
    return len(later) >= federation.patience
