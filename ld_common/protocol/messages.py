"""Messages between server and sites; the only module of `ld_common` that uses Flower.

join    <- the site's name
train   -> adapter, round, study and hashes          server to site
        -> the adapter's frozen part                 if the study has a start
        -> directions of the latent space            for a longitudinal drift, after its first round or from the start
        -> factors to add to the base                for aggregators fedex and flora
        -> nonce, the site's last audit head         in a deployment
        <- trained tensors, drift                    site to server
        <- the site's own factors                    for aggregator fedsa, where the site's policy releases them
        <- losses, counts, ranges of the data        without privacy and secure aggregation
        <- signature, audit head                     in a deployment
evaluate, after a round: as train, with the round's result as the adapter
        <- scores on held-out patients               without privacy and secure aggregation
        <- signature, audit head                     in a deployment
keys, shares, unmask: stages of secure aggregation; stage `vector` is part of train, in place of tensors and drift
        <- an error code                             never the text of an exception
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

from ld_common.core.errors import LdError
from ld_common.core.state import State, Tensors, tensor_sizes
from ld_common.protocol.attestation import Attestation, AuditHead, content_digest, head_from_record, head_record, plain
from ld_common.protocol.secagg.messages import Payload

JOIN, SECURE, HEAD, ATTESTATION, TENSORS = "join", "secure", "audit-head", "attestation", "safetensors"
FROZEN, BASIS, CARRIED, DRIFT, OWN = "frozen", "basis", "carried", "drift", "own"
VALIDATION = "validation"
LOSS, SCORED_VISITS = "loss", "visits"
"""Scores of every validation; others depend on the study."""
MOST_SCORES = 16
LARGE_BYTES = 2**28
"""Tensors of this size are packed through files, as copies of them take much memory."""
MAX_ARRAY_HEADER = 4096
ERROR_SENTENCES = {
    "store": "the site's store is absent, or of another base model or modality",
    "policy": "the study asks for more than the site allows",
    "model": "the site cannot load the base model",
    "adapter": "the adapter does not fit the site's base model",
    "config": "the site cannot read its config or the study's",
    "privacy": "the site's privacy budget does not allow it, or the study cannot be trained privately there",
    "federation": "the site cannot follow the round's secure aggregation",
    "approval": "the site has not approved the study, or no longer does",
    "signature": "a signature does not hold at the site, or its key cannot be used",
    "deployment": "the site's folder of the study cannot be used",
    "held_out": "the site holds out no patients, or fewer than its policy.min_patients",
    "diverged": "training gave a loss that is not finite",
    "error": "the site failed for a reason that stays at the site",
}


@dataclass(frozen=True)
class TrainTask:
    """A site's task of one round."""

    state: State
    """The adapter's trainable part."""
    round: int
    study: str
    """The study config as JSON."""
    base_digest: str
    modality_digest: str
    secure: Payload | None = None
    """Under secure aggregation, the request of its stage `vector`."""
    nonce: str = ""
    """Part of what the site signs (`attestation.new_nonce`); empty where sites have no keys."""
    audit_head: AuditHead | None = None
    """The last head of the site's audit log that the server holds."""
    frozen: State = field(default_factory=dict)
    """The adapter's frozen part, from the study's start; empty where sites draw it from the study's seed."""
    basis: State = field(default_factory=dict)
    """Of a longitudinal drift (`longitudinal_sums.Basis`); empty in the round that sketches it. Of a private study the
    start's (`public_basis.PublicBasis`), in every round."""
    carried: State = field(default_factory=dict)
    """Factors whose products are added to the base's weights (`Adapter.add_to_base`)."""
    drift: State = field(default_factory=dict)
    """In a validation, the study's longitudinal drift so far, where there is one."""

    @property
    def weights(self) -> State:
        """All tensors that decide what the network computes, by name: what a ledger and a start's hash are of."""
        return {**self.frozen, **self.state, **{f"{CARRIED}/{name}": value for name, value in self.carried.items()}}


@dataclass(frozen=True)
class TrainNumbers:
    """Exact counts and losses of a site, which must not leave under differential privacy."""

    visits: int
    patients: int
    loss_first: float
    """Mean over the round's first fifth."""
    loss_last: float
    """Mean over the last fifth."""
    seconds: float
    coverage: list[float] = field(default_factory=list)
    """Ranges of the site's data, over groups of patients (`ld_common.release.data_ranges`)."""


@dataclass(frozen=True)
class TrainResult:
    """A site's result of one round."""

    site: str
    round: int
    state: Tensors
    """As it travels (`ld_common.protocol.wire_formats`)."""
    drift: Tensor | None
    numbers: TrainNumbers | None
    """None under differential privacy and secure aggregation."""
    secure: Payload | None = None
    """Under secure aggregation the answer of its stage `vector`, in place of state and drift."""
    attestation: Attestation | None = None
    """The site's signature over all other fields; None where sites have no keys."""
    scores: dict[str, float] | None = None
    """In place of all else, what a validation found on the site's held-out patients: `loss`, `visits` and others."""
    own: State = field(default_factory=dict)
    """The tensors that the study leaves at each site (`StudyConfig.keeps`), where the site lets its own be released."""

    @property
    def uplink_bytes(self) -> int:
        """Size of all tensors that the site sends."""
        drift = {} if self.drift is None else {"drift": self.drift}
        masked = 0 if self.secure is None else len(bytes(self.secure["vector"]))  # type: ignore[arg-type]
        return masked + sum(sum(tensor_sizes(sent).values()) for sent in (self.state, drift, self.own))

    def content_digest(self) -> str:
        """SHA-256 of all fields but the attestation, with each tensor by name, type, shape and bytes.

        Raises:
            SignatureError: a number that is not finite.
        """
        secure = None if self.secure is None else {name: plain(value) for name, value in self.secure.items()}
        return content_digest(
            {
                "site": self.site,
                "round": self.round,
                "state": [tensor_record(name, self.state[name]) for name in sorted(self.state)],
                "drift": None if self.drift is None else tensor_record("drift", self.drift),
                "numbers": None if self.numbers is None else vars(self.numbers),
                "secure": secure,
                "scores": self.scores,
                "own": [tensor_record(name, self.own[name]) for name in sorted(self.own)],
            }
        )


def tensor_record(name: str, tensor: Tensor) -> dict[str, Any]:
    """Name, type, shape, size and SHA-256 of a tensor, over its bytes in memory (little-endian)."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "name": name,
        "type": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def pack_tensors(state: State) -> ArrayRecord:
    """Tensors as one array, the bytes of a safetensors file: Flower sends a request for each array."""
    if not state:
        return ArrayRecord({})
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    if sum(value.numel() * value.element_size() for value in tensors.values()) < LARGE_BYTES:
        return ArrayRecord({TENSORS: Array(np.frombuffer(save(tensors), dtype=np.uint8))})
    # NumPy's and safetensors' writers hold copies of all that they write; files do not
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as packed:
        path = Path(folder) / TENSORS
        save_file(tensors, path)
        length = path.stat().st_size
        header = {"descr": "|u1", "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(packed, header)
        with path.open("rb") as content:
            shutil.copyfileobj(content, packed, 2**24)
        path.unlink()
        packed.seek(0)
        return ArrayRecord({TENSORS: Array("uint8", (length,), "numpy.ndarray", packed.read())})


def tensor_bytes(record: ArrayRecord) -> memoryview:
    """The bytes that `pack_tensors` packed, without a copy; raises `KeyError` or `ValueError` for anything else."""
    array = record[TENSORS]
    if len(record) != 1 or array.stype != "numpy.ndarray":
        raise ValueError("not one array of NumPy's")
    head = io.BytesIO(array.data[:MAX_ARRAY_HEADER])
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(head)
    if version not in readers:
        raise ValueError("not an array of bytes")
    shape, _, dtype = readers[version](head)
    content = memoryview(array.data)[head.tell() :]
    if dtype != np.uint8 or shape != (len(content),):
        raise ValueError("not one array of bytes")
    return content


def unpack_tensors(record: ArrayRecord) -> State:
    """The tensors of `pack_tensors`; raises `KeyError` or `ValueError` for anything else."""
    if not record:
        return {}
    try:
        return dict(sorted(load(bytes(tensor_bytes(record))).items()))  # safetensors keeps no order
    except SafetensorError as error:
        raise ValueError("not a safetensors file") from error


def pack_tasks(tasks: Mapping[str, TrainTask]) -> dict[str, RecordDict]:
    """Tasks by site as message contents, which share what is the same in them."""
    packed: dict[int, ArrayRecord] = {}

    def pack(state: State) -> ArrayRecord:
        if id(state) not in packed:
            packed[id(state)] = pack_tensors(state)
        return packed[id(state)]

    return {site: pack_task(task, pack) for site, task in tasks.items()}


def pack_task(task: TrainTask, pack: Callable[[State], ArrayRecord] = pack_tensors) -> RecordDict:
    """A task as message content, with its tensors as `pack` packs them."""
    fields = ConfigRecord(
        {
            "round": task.round,
            "study": task.study,
            "base-digest": task.base_digest,
            "modality-digest": task.modality_digest,
            "nonce": task.nonce,
        }
    )
    secure = {} if task.secure is None else {SECURE: ConfigRecord(dict(task.secure))}
    head = {} if task.audit_head is None else {HEAD: ConfigRecord(dict(head_record(task.audit_head)))}
    given = {FROZEN: task.frozen, BASIS: task.basis, CARRIED: task.carried, DRIFT: task.drift}
    tensors = {name: pack(state) for name, state in given.items() if state}
    return RecordDict({"state": pack(task.state), "task": fields, **tensors, **secure, **head})


def unpack_task(content: RecordDict) -> TrainTask:
    """A task from message content; raises `KeyError` when a part is absent, `ValueError` when one is malformed."""
    fields, head = content.config_records["task"], content.config_records.get(HEAD)
    given = {name: content.array_records.get(name) for name in (FROZEN, BASIS, CARRIED, DRIFT)}
    tensors = {name: {} if record is None else unpack_tensors(record) for name, record in given.items()}
    return TrainTask(
        state=unpack_tensors(content.array_records["state"]),
        round=int(fields["round"]),  # type: ignore[arg-type]
        study=str(fields["study"]),
        base_digest=str(fields["base-digest"]),
        modality_digest=str(fields["modality-digest"]),
        secure=unpack_secure(content),
        nonce=str(fields.get("nonce", "")),
        audit_head=None if head is None else head_from_record(head),
        frozen=tensors[FROZEN],
        basis=tensors[BASIS],
        carried=tensors[CARRIED],
        drift=tensors[DRIFT],
    )


def pack_result(result: TrainResult) -> RecordDict:
    """A result as message content."""
    numbers = {} if result.numbers is None else vars(result.numbers)
    drift = {} if result.drift is None else {"drift": result.drift}
    secure = {} if result.secure is None else {SECURE: ConfigRecord(dict(result.secure))}
    scores = {} if result.scores is None else {VALIDATION: MetricRecord(dict(result.scores))}
    own = {OWN: pack_tensors(result.own)} if result.own else {}
    signed = {} if result.attestation is None else {ATTESTATION: _signed(result.attestation)}
    return RecordDict(
        {
            "state": pack_tensors(dict(result.state)),
            "drift": pack_tensors(drift),
            "numbers": MetricRecord(dict(numbers)),
            "site": ConfigRecord({"name": result.site, "round": result.round}),
            **secure,
            **scores,
            **own,
            **signed,
        }
    )


def unpack_result(content: RecordDict, keep: Callable[[ArrayRecord], Tensors] = unpack_tensors) -> TrainResult:
    """A result from message content; raises `KeyError`, `TypeError` or `ValueError` for anything else.

    Args:
        content: the message's.
        keep: makes the state of its tensors, and may put them elsewhere than into memory.
    """
    numbers, site = dict(content.metric_records["numbers"]), content.config_records["site"]
    signed, scores = content.config_records.get(ATTESTATION), content.metric_records.get(VALIDATION)
    own = content.array_records.get(OWN)
    return TrainResult(
        site=str(site["name"]),
        round=int(site["round"]),  # type: ignore[arg-type]
        state=keep(content.array_records["state"]),
        drift=unpack_tensors(content.array_records["drift"]).get("drift"),
        numbers=_numbers(numbers) if numbers else None,
        secure=unpack_secure(content),
        attestation=None if signed is None else _attestation(signed),
        scores=None if scores is None else {str(name): float(value) for name, value in scores.items()},  # type: ignore[arg-type]
        own={} if own is None else unpack_tensors(own),
    )


def pack_secure(payload: Payload) -> RecordDict:
    """A stage of secure aggregation as message content."""
    return RecordDict({SECURE: ConfigRecord(dict(payload))})


def unpack_secure(content: RecordDict) -> Payload | None:
    """A stage's payload from message content, or None."""
    record = content.config_records.get(SECURE)
    return None if record is None else dict(record)  # type: ignore[arg-type]


def _signed(attestation: Attestation) -> ConfigRecord:
    head = {f"head-{name}": value for name, value in head_record(attestation.head).items()}
    return ConfigRecord({"signature": attestation.signature, **head})


def _attestation(record: Mapping[str, Any]) -> Attestation:
    head = {name.removeprefix("head-"): value for name, value in record.items() if name.startswith("head-")}
    return Attestation(str(record["signature"]), head_from_record(head))


def _numbers(record: dict[str, Any]) -> TrainNumbers:
    return TrainNumbers(
        visits=int(record["visits"]),
        patients=int(record["patients"]),
        loss_first=float(record["loss_first"]),
        loss_last=float(record["loss_last"]),
        seconds=float(record["seconds"]),
        coverage=[float(value) for value in record["coverage"]],
    )


def error_code(error: BaseException) -> str:
    """The part of an error that may leave: one of the codes of `ERROR_SENTENCES`."""
    code = type(error).code if isinstance(error, LdError) else "error"
    return code if isinstance(code, str) and code in ERROR_SENTENCES else "error"


def pack_error(code: str) -> RecordDict:
    """An error as message content: one of the codes of `ERROR_SENTENCES`."""
    return RecordDict({"error": ConfigRecord({"code": code if code in ERROR_SENTENCES else "error"})})


def unpack_error(content: RecordDict) -> str | None:
    """The fixed sentence of an error, or None when the content is not an error."""
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
