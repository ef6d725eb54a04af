"""Writes what one message asked, did and sent into the site's audit log, and signs what leaves.

A site without a home, as in a simulation, has neither log nor key: there it does nothing. Patients' identifiers and
the text of unexpected errors, which may hold them, are kept out of the log too.
"""

from __future__ import annotations

import contextlib
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ld_client.deployment.approvals import approvals
from ld_client.deployment.audit_log import AuditLog
from ld_client.deployment.site_home import SiteHome
from ld_client.round import DataUsage
from ld_common.core.errors import ConfigError, FederationError, LdError, ScanError, TableError
from ld_common.protocol.attestation import AuditHead, Statement, attest, check_head, head_record, plain
from ld_common.protocol.messages import TrainResult, TrainTask, error_code, tensor_record
from ld_common.protocol.study_config import StudyConfig, study_from_json

NONCE = re.compile(r"[0-9a-f]{0,128}")
MOST_LETTERS = 1000
"""Of one text in the log."""


class AuditRecorder:
    """One message to a site."""

    def __init__(self, home: SiteHome | None, kind: str, run: int) -> None:
        self.home, self.kind, self.run = home, kind, run
        self.round: int | None = None

    def asked(self) -> None:
        """A message came, whatever it holds; raises `LdError` when the home cannot be used, and nothing is answered."""
        if self.home is not None:
            self._write("asked", {"bundle": running_bundle(self.home)})

    def task(self, task: TrainTask) -> None:
        """Write a training task down, with the head of this log that the server holds.

        Raises:
            SignatureError: the head is none that this site has signed.
            LdError: the task or the home cannot be used.
        """
        self.round = task.round
        if self.home is None:
            return
        study, log = _read_study(task), AuditLog.of(self.home)
        asked: dict[str, Any] = {"study_text_letters": len(task.study)}
        if study is not None:
            asked = {"study": _words(study.name), "study_digest": study.digest()}
        asked |= {"base": _words(task.base_digest), "modality": _words(task.modality_digest)}
        self._write("task", {**asked, "nonce": _words(task.nonce), "tensors": len(task.state) + len(task.frozen)})
        if NONCE.fullmatch(task.nonce) is None:
            raise FederationError("the task's nonce is not hexadecimal: it is not from this software's server")
        if task.audit_head is not None:
            check_head(log.key.public_key(), task.audit_head, log.site, log.study)
            self._append(log, "acknowledged", head_record(task.audit_head))

    def training(self, use: DataUsage) -> None:
        """The data are about to be used."""
        privacy = use.study.privacy
        noise = {
            "noise_multiplier": use.noise_multiplier,
            "delta": privacy.target_delta,
            "epsilon": privacy.target_epsilon,
        }
        self._write(
            "training",
            {
                "store": use.store,
                "patients": use.patients,
                "visits": use.visits,
                "steps": use.study.training.steps,
                "privacy": noise if privacy.enabled else None,
            },
        )

    def signed(self, task: TrainTask, result: TrainResult) -> TrainResult:
        """The result as it may leave: written down, and signed together with the head of the log that says so."""
        if self.home is None:
            return result
        log, content = AuditLog.of(self.home), result.content_digest()
        head = self._append(log, "left", {**_sent(result), "content": content})
        self._append(log, "head", head_record(head))
        statement = Statement(study_from_json(task.study).digest(), result.site, result.round, task.nonce, content)
        return replace(result, attestation=attest(log.key, statement, head))

    def left_payload(self, payload: Mapping[str, object]) -> None:
        """An answer of secure aggregation is about to leave."""
        self._write("left", {"payload": {name: plain(value) for name, value in payload.items()}})

    def left_name(self, name: str) -> None:
        """The site's name is about to leave."""
        self._write("left", {"name": name})

    def refused(self, error: BaseException) -> None:
        """The message is answered by a code. Never raises: the code leaves whatever becomes of the log."""
        try:
            reason = {"error": type(error).__name__, "reason": _reason(error)}
            self._write("refused", {"code": error_code(error), **reason})
        except BaseException as failure:  # as `error`: no text may pass here
            with contextlib.suppress(Exception):
                print(f"a refusal is not in the audit log: {type(failure).__name__}", file=sys.stderr)

    def _write(self, event: str, details: dict[str, Any]) -> None:
        if self.home is not None:
            self._append(AuditLog.of(self.home), event, details)

    def _append(self, log: AuditLog, event: str, details: Mapping[str, Any]) -> AuditHead:
        said = {"kind": self.kind, "run": str(self.run)} | ({} if self.round is None else {"round": self.round})
        return log.append(event, {**said, **details})


def running_bundle(home: SiteHome) -> str | None:
    """Hash of the code bundle that this file was unpacked from, None for installed software.

    Flower names a bundle's folder by the first digits of its hash; the rest is known of those that were approved.
    """
    folder = next((one for one in Path(__file__).resolve().parents if one.parent.name == "apps"), None)
    if folder is None:
        return None
    digits = folder.name.rsplit(".", 1)[-1]
    known = {one.bundle for one in approvals(home)}
    return next((bundle for bundle in sorted(known) if bundle.startswith(digits)), digits)


def _read_study(task: TrainTask) -> StudyConfig | None:
    try:
        return study_from_json(task.study)
    except ConfigError:
        return None


def _words(text: str) -> str:
    """A text that others chose, cut to a bearable length and to what UTF-8 can write."""
    return text[:MOST_LETTERS].encode(errors="replace").decode()


def _sent(result: TrainResult) -> dict[str, Any]:
    return {
        "site": result.site,
        "tensors": [tensor_record(name, result.state[name]) for name in sorted(result.state)],
        "drift": None if result.drift is None else tensor_record("drift", result.drift),
        "numbers": None if result.numbers is None else dict(vars(result.numbers)),
        "payload": None if result.secure is None else {name: plain(value) for name, value in result.secure.items()},
        "bytes": result.uplink_bytes,
    }


def _reason(error: BaseException) -> str:
    """An error's own text where this project wrote it and it names no scan; else where in the code it came from."""
    if isinstance(error, LdError) and not isinstance(error, (ScanError, TableError)):
        with contextlib.suppress(Exception):  # a text that cannot be made
            return _words(str(error))
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"
    return f"raised at {place}; its text may name a patient and is not kept"
