"""What crosses the wire between server and sites: the only module of `ld_common` that knows Flower.

join    -> site's name
train   -> adapter, round, study and hashes          server to site
        <- learned tensors, drift                    site to server
        <- losses, counts                            only without privacy or secure aggregation
keys, shares, unmask: secure aggregation's stages; its `vector` rides on train, in place of tensors and drift
        <- an error code                             never an exception's text
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from ld_common.schemes import State
from ld_common.secure_aggregation import Payload

JOIN, SECURE = "join", "secure"
ERROR_SENTENCES = {
    "store": "the site's store is absent, or of another base model or modality",
    "policy": "the study asks for more than the site allows",
    "model": "the site cannot load the base model",
    "adapter": "the adapter does not fit the site's base model",
    "config": "the site cannot read its config or the study's",
    "privacy": "the site's privacy budget does not allow it, or the study cannot be trained privately there",
    "federation": "the site cannot follow the round's secure aggregation",
    "diverged": "training gave a loss that is not finite",
    "error": "the site failed for a reason that stays at the site",
}


@dataclass(frozen=True)
class TrainTask:
    """What a site is asked to do in one round."""

    state: State
    round: int
    study: str
    """The study config as JSON."""
    base_digest: str
    modality_digest: str
    secure: Payload | None = None
    """Under secure aggregation, the request of its stage `vector`."""


@dataclass(frozen=True)
class TrainNumbers:
    """What a site says of its data and training, exactly: nothing that may leave under differential privacy."""

    visits: int
    patients: int
    loss_first: float
    """Mean over the round's first fifth."""
    loss_last: float
    """Mean over the last fifth."""
    seconds: float


@dataclass(frozen=True)
class TrainResult:
    """What a site answers."""

    site: str
    round: int
    state: State
    drift: Tensor | None
    numbers: TrainNumbers | None
    """None under differential privacy and secure aggregation."""
    secure: Payload | None = None
    """Under secure aggregation the answer of its stage `vector`, in place of state and drift."""

    @property
    def uplink_bytes(self) -> int:
        """Bytes of all tensors that the site sends."""
        tensors = [*self.state.values(), *([] if self.drift is None else [self.drift])]
        masked = 0 if self.secure is None else len(bytes(self.secure["vector"]))  # type: ignore[arg-type]
        return masked + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def pack_task(task: TrainTask) -> RecordDict:
    """A task as message content."""
    words = ConfigRecord(
        {
            "round": task.round,
            "study": task.study,
            "base-digest": task.base_digest,
            "modality-digest": task.modality_digest,
        }
    )
    secure = {} if task.secure is None else {SECURE: ConfigRecord(dict(task.secure))}
    return RecordDict({"state": ArrayRecord(dict(task.state)), "task": words, **secure})


def unpack_task(content: RecordDict) -> TrainTask:
    """A task from message content; raises `KeyError` when a part is absent."""
    words = content.config_records["task"]
    return TrainTask(
        state=dict(content.array_records["state"].to_torch_state_dict()),
        round=int(words["round"]),  # type: ignore[arg-type]
        study=str(words["study"]),
        base_digest=str(words["base-digest"]),
        modality_digest=str(words["modality-digest"]),
        secure=unpack_secure(content),
    )


def pack_result(result: TrainResult) -> RecordDict:
    """A result as message content."""
    numbers = {} if result.numbers is None else vars(result.numbers)
    drift = {} if result.drift is None else {"drift": result.drift}
    secure = {} if result.secure is None else {SECURE: ConfigRecord(dict(result.secure))}
    return RecordDict(
        {
            "state": ArrayRecord(dict(result.state)),
            "drift": ArrayRecord(drift),
            "numbers": MetricRecord(dict(numbers)),
            "site": ConfigRecord({"name": result.site, "round": result.round}),
            **secure,
        }
    )


def unpack_result(content: RecordDict) -> TrainResult:
    """A result from message content; raises `KeyError`, `TypeError` or `ValueError` when it is not one."""
    numbers, site = dict(content.metric_records["numbers"]), content.config_records["site"]
    return TrainResult(
        site=str(site["name"]),
        round=int(site["round"]),  # type: ignore[arg-type]
        state=dict(content.array_records["state"].to_torch_state_dict()),
        drift=content.array_records["drift"].to_torch_state_dict().get("drift"),
        numbers=_numbers(numbers) if numbers else None,
        secure=unpack_secure(content),
    )


def pack_secure(payload: Payload) -> RecordDict:
    """A stage of secure aggregation as message content."""
    return RecordDict({SECURE: ConfigRecord(dict(payload))})


def unpack_secure(content: RecordDict) -> Payload | None:
    """A stage's payload from message content, or None."""
    record = content.config_records.get(SECURE)
    return None if record is None else dict(record)  # type: ignore[arg-type]


def _numbers(record: dict[str, Any]) -> TrainNumbers:
    return TrainNumbers(
        visits=int(record["visits"]),
        patients=int(record["patients"]),
        loss_first=float(record["loss_first"]),
        loss_last=float(record["loss_last"]),
        seconds=float(record["seconds"]),
    )


def pack_error(code: str) -> RecordDict:
    """An error as message content: one of the codes of `ERROR_SENTENCES`, and nothing else."""
    return RecordDict({"error": ConfigRecord({"code": code if code in ERROR_SENTENCES else "error"})})


def unpack_error(content: RecordDict) -> str | None:
    """The fixed sentence of an error answer, or None when the content is no error."""
    if "error" not in content.config_records:
        return None
    return ERROR_SENTENCES.get(str(content.config_records["error"].get("code")), ERROR_SENTENCES["error"])


def pack_name(site: str) -> RecordDict:
    """A site's answer to `join`."""
    return RecordDict({"site": ConfigRecord({"name": site})})


def unpack_name(content: RecordDict) -> str | None:
    """The name in an answer to `join`, or None."""
    record = content.config_records.get("site")
    return None if record is None else str(record.get("name"))
