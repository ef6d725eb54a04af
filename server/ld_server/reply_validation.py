"""Decodes and checks a site's reply; a reply that cannot be used leaves its site out of the round."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from flwr.app import Array, ArrayRecord, Message, RecordDict

from ld_common.adapters.state_dict import checked_update_norm
from ld_common.core.errors import AdapterError, LdError
from ld_common.core.state import State, Tensors
from ld_common.diffusion.drift import by_channel
from ld_common.protocol import messages
from ld_common.protocol.messages import TrainResult, TrainTask
from ld_common.protocol.study_config import StudyConfig
from ld_server.drift_form import DriftForm

MAX_REASON_LENGTH = 300
SPARE_BYTES, SPARE_BYTES_A_TENSOR = 2**20, 1024


def read_reply(
    reply: Message,
    site: str,
    task: TrainTask,
    study: StudyConfig,
    limit: int,
    keep: Callable[[ArrayRecord], Tensors] = messages.unpack_tensors,
) -> TrainResult:
    """The result in a reply to this site's task; its tensors are not checked yet.

    Args:
        reply: the site's.
        site: its name.
        task: what it was asked.
        study: the task's.
        limit: largest number of bytes, of `max_reply_bytes`.
        keep: makes the result's state.

    Raises:
        AdapterError: an error, too many bytes, another site or round, or fields that the study withholds.
        Exception: of any kind, when it cannot be decoded.
    """
    if reply.has_error():
        raise AdapterError(f"its node failed with code {reply.error.code}")
    size = content_bytes(reply.content)
    if size > limit:
        raise AdapterError(f"its reply has {size:,} bytes, a valid one at most {limit:,}")
    if (sentence := messages.unpack_error(reply.content)) is not None:
        raise AdapterError(sentence)
    result = messages.unpack_result(reply.content, keep)
    if (result.site, result.round) != (site, task.round):
        raise AdapterError(f"its reply is of site '{result.site}' and round {result.round}")
    secure = study.federation.secure_aggregation
    if result.scores is not None:
        raise AdapterError("its reply to a training task is that of a validation")
    withheld = result.numbers is None, result.secure is not None
    if withheld != (study.withholds_numbers, secure) or (secure and (result.state or result.drift is not None)):
        raise AdapterError("its reply does not hold exactly the fields that the study asks for")
    if result.own:
        check_own(result.own, task, study)
    if result.secure is not None and not isinstance(result.secure["vector"], bytes):
        raise AdapterError("its masked vector is not bytes")
    return result


def check_own(own: State, task: TrainTask, study: StudyConfig) -> None:
    """Raise `AdapterError` unless these are finite tensors that the study leaves at the sites, within its norm."""
    kept = {name: value for name, value in task.state.items() if study.keeps(name)}
    if not kept:
        raise AdapterError("it sends factors of its own, and the study leaves none at the sites")
    norm, most = checked_update_norm(own, kept), study.federation.max_update_norm
    if norm > most:
        raise AdapterError(f"its own factors have norm {norm:.3g}, more than federation.max_update_norm {most:g}")


def max_reply_bytes(state: State, form: DriftForm | None) -> int:
    """Largest size of a valid reply to a task with this state, masked or not."""
    numbers = sum(value.numel() for value in state.values())
    drift = 0 if form is None else math.prod(form.shape) * form.dtype.itemsize
    return 2 * (4 * numbers + drift) + SPARE_BYTES_A_TENSOR * len(state) + SPARE_BYTES


def content_bytes(content: RecordDict) -> int:
    """Size of a message's content before it is decoded."""
    total = 0
    for record in content.values():
        for key, value in record.items():
            values = value if isinstance(value, list) else [value]
            total += len(key) + sum(map(_size, values))
    return total


def _size(value: object) -> int:
    data = value.data if isinstance(value, Array) else value
    return len(data) if isinstance(data, str | bytes) else 8


def reason(error: LdError) -> str:
    """Why a site is left out, as one printable line of bounded length; parts of it may come from the site."""
    text = " ".join("".join(sign if sign.isprintable() else " " for sign in str(error)).split())
    return text if len(text) <= MAX_REASON_LENGTH else text[:MAX_REASON_LENGTH] + "..."


def summary(result: TrainResult, norm: float | None, clip: float) -> dict[str, Any]:
    """What the round's record keeps of a site's result; None for what the study withholds.

    Args:
        result: the site's.
        norm: L2 norm of its update, where it is known.
        clip: norm to which a larger update is scaled down; 0 for none.
    """
    withheld = dict.fromkeys(("visits", "patients", "loss_first", "loss_last", "seconds", "coverage"))
    return {
        **(withheld if result.numbers is None else vars(result.numbers)),
        "update_norm": norm,
        "clipped": None if norm is None else 0 < clip < norm,
        "uplink_bytes": result.uplink_bytes,
        "drift": None if result.drift is None or result.drift.dim() == 1 else by_channel(result.drift),
    }
