"""Records in the site's audit log what a message asked for, ran and sent, and signs results.

A site without a home, as in a simulation, has neither log nor key; nothing is recorded there. The log holds no patient
identifier and no text of an unexpected error, which could contain one.
"""

from __future__ import annotations

import contextlib
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ld_client.data.withdrawals import read_withdrawals
from ld_client.deployment.audit_log import CONSENT, AuditLog, check_holds, last_entry
from ld_client.deployment.site_home import SiteHome
from ld_client.privacy.ledger import Ledger, LedgerMark
from ld_client.round import DataUsage
from ld_common.core.errors import ConfigError, FederationError, LdError, ScanError, StoreError, TableError
from ld_common.protocol.attestation import AuditHead, Statement, attest, check_head, head_record, plain
from ld_common.protocol.messages import TrainResult, TrainTask, error_code, tensor_record
from ld_common.protocol.study_config import StudyConfig, study_from_json

NONCE = re.compile(r"[0-9a-f]{0,128}")
MAX_TEXT_LENGTH = 1000
"""Characters of one text in the log."""


class AuditRecorder:
    """Records one message to a site."""

    def __init__(self, home: SiteHome | None, kind: str, run: int) -> None:
        self.home, self.kind, self.run = home, kind, run
        self.round: int | None = None

    def record_request(self) -> None:
        """Record that a message came; raises `LdError` when the home cannot be used."""
        if self.home is not None:
            self._write("asked", {"bundle": running_bundle(self.home)})

    def record_task(self, task: TrainTask) -> None:
        """Record a training task, and the head of this log that the server holds.

        Raises:
            SignatureError: this site did not sign that head.
            DeploymentError: this log does not hold that head: it was put back from an older copy, or rewritten.
            LdError: the task or the home cannot be used.
        """
        self.round = task.round
        if self.home is None:
            return
        study, log = _read_study(task), AuditLog.of(self.home)
        details: dict[str, Any] = {"study_text_length": len(task.study)}
        if study is not None:
            details = {"study": _shortened(study.name), "study_digest": study.digest()}
        details |= {"base": _shortened(task.base_digest), "modality": _shortened(task.modality_digest)}
        self._write("task", {**details, "nonce": _shortened(task.nonce), "tensors": len(task.weights)})
        if NONCE.fullmatch(task.nonce) is None:
            raise FederationError("the task's nonce is not hexadecimal: it is not from this software's server")
        if task.audit_head is not None:
            check_head(log.key.public_key(), task.audit_head, log.site, log.study)
            self._append(log, "acknowledged", head_record(task.audit_head))
            check_holds(log.path, task.audit_head)

    def check_ledger(self, ledger: Ledger) -> None:
        """Refuse a ledger that lacks charges of this log; raises `PrivacyError`."""
        last = None if self.home is None else last_entry(self.home.audit_log, {"training"})
        if last is not None and "ledger" in last.details:
            ledger.check_mark(LedgerMark(**last.details["ledger"]))

    def check_withdrawals(self, store: Path) -> None:
        """Refuse a list of withdrawals that lacks some of this log; raises `StoreError`."""
        last = None if self.home is None else last_entry(self.home.audit_log, {CONSENT})
        if last is not None and len(read_withdrawals(store)) < int(last.details["withdrawals"]):
            raise StoreError(
                f"the list of withdrawals in '{store}' lacks patients who withdrew consent by the site's audit log: it "
                "was put back from an older copy. Restore the newest copy; nothing trains until then"
            )

    def record_training(self, usage: DataUsage) -> None:
        """Record the data that a round is about to train on."""
        privacy = usage.study.privacy
        noise = {
            "noise_multiplier": usage.noise_multiplier,
            "delta": privacy.target_delta,
            "epsilon": privacy.target_epsilon,
        }
        self._write(
            "training",
            {
                "store": usage.store,
                "patients": usage.patients,
                "held_out_patients": usage.held_out_patients,
                "visits": usage.visits,
                "steps": usage.study.training.steps,
                "privacy": noise if privacy.enabled else None,
                "ledger": asdict(usage.ledger),
            },
        )

    def sign_result(self, task: TrainTask, result: TrainResult) -> TrainResult:
        """Record a result, and sign it together with the head of the log that holds the record."""
        if self.home is None:
            return result
        log, content = AuditLog.of(self.home), result.content_digest()
        head = self._append(log, "left", {**_sent(result), "content": content})
        self._append(log, "head", head_record(head))
        statement = Statement(study_from_json(task.study).digest(), result.site, result.round, task.nonce, content)
        return replace(result, attestation=attest(log.key, statement, head))

    def record_sent_payload(self, payload: Mapping[str, object]) -> None:
        """Record an answer of secure aggregation before it is sent."""
        self._write("left", {"payload": {name: plain(value) for name, value in payload.items()}})

    def record_sent_name(self, name: str) -> None:
        """Record that the site's name is sent."""
        self._write("left", {"name": name})

    def record_refusal(self, error: BaseException) -> None:
        """Record that the message is answered by an error code. Never raises, so that the code is always sent."""
        try:
            reason = {"error": type(error).__name__, "reason": _reason(error)}
            self._write("refused", {"code": error_code(error), **reason})
        except BaseException as failure:  # its text could name a patient, too
            with contextlib.suppress(Exception):
                print(f"a refusal is not in the audit log: {type(failure).__name__}", file=sys.stderr)

    def _write(self, event: str, details: dict[str, Any]) -> None:
        if self.home is not None:
            self._append(AuditLog.of(self.home), event, details)

    def _append(self, log: AuditLog, event: str, details: Mapping[str, Any]) -> AuditHead:
        origin = {"kind": self.kind, "run": str(self.run)} | ({} if self.round is None else {"round": self.round})
        return log.append(event, {**origin, **details})


def running_bundle(home: SiteHome) -> str | None:
    """Hash of the code bundle that this file was unpacked from; None for installed software."""
    folders = [path for path in Path(__file__).resolve().parents if path.parent == home.code_folders.resolve()]
    return folders[0].name.partition("-")[2] if folders else None


def _read_study(task: TrainTask) -> StudyConfig | None:
    try:
        return study_from_json(task.study)
    except ConfigError:
        return None


def _shortened(text: str) -> str:
    """Text of others, cut to `MAX_TEXT_LENGTH` and to what UTF-8 can encode."""
    return text[:MAX_TEXT_LENGTH].encode(errors="replace").decode()


def _sent(result: TrainResult) -> dict[str, Any]:
    return {
        "site": result.site,
        "tensors": [tensor_record(name, result.state[name]) for name in sorted(result.state)],
        "drift": None if result.drift is None else tensor_record("drift", result.drift),
        "numbers": None if result.numbers is None else dict(vars(result.numbers)),
        "payload": None if result.secure is None else {name: plain(value) for name, value in result.secure.items()},
        "scores": result.scores,
        "own": [tensor_record(name, result.own[name]) for name in sorted(result.own)],
        "bytes": result.uplink_bytes,
    }


def _reason(error: BaseException) -> str:
    """The text of our own errors that name no scan; for others, the place in the code that raised them."""
    if isinstance(error, LdError) and not isinstance(error, (ScanError, TableError)):
        with contextlib.suppress(Exception):  # a text that cannot be made
            return _shortened(str(error))
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"
    return f"raised at {place}; its text may name a patient and is not logged"
