"""Who takes part in a deployed study: the sites admitted by key, with signed results."""

from __future__ import annotations

from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ld_common.core.errors import AdapterError, SignatureError
from ld_common.protocol.attestation import (
    AuditHead,
    Statement,
    check_attestation,
    check_head,
    head_from_record,
    head_record,
    new_nonce,
)
from ld_common.protocol.messages import TrainResult, TrainTask
from ld_common.protocol.site_keys import SiteKeys
from ld_common.protocol.study_config import StudyConfig
from ld_server.deployment.study_home import StudyHome
from ld_server.node_registry import AUDIT_HEAD, Admission, AllowedKeys, Entry


def deployed_admission(home: StudyHome, study: StudyConfig) -> Admission:
    """The admission of a home's sites that are admitted and not revoked, checked each round and for each result.

    Each task has its own nonce, and a result counts only with the site's signature over both. The record keeps the
    head of the site's audit log that comes with it; the site's next task carries it back.
    """
    digest = study.digest()

    def allowed() -> dict[str, SiteKeys]:
        return {name: site.keys for name, site in home.sites().items() if site.revoked is None}

    def node_keys() -> dict[str, str]:
        return {name: keys.node for name, keys in allowed().items()}

    def signing_keys() -> dict[str, Ed25519PublicKey]:
        return {name: keys.signing_key for name, keys in allowed().items()}

    def signing_key(name: str) -> Ed25519PublicKey | None:
        site = home.sites().get(name)
        return None if site is None or site.revoked is not None else site.keys.signing_key

    def prepare(site: str, task: TrainTask, last: Entry | None) -> TrainTask:
        record = last and last.get(AUDIT_HEAD)
        head = head_from_record(record) if record else None
        if head is not None and not _is_signed(head, signing_key(site), study.name):
            head = None  # the site has a new key, and a new log
        return replace(task, nonce=new_nonce(), audit_head=head)

    def check(site: str, task: TrainTask, result: TrainResult) -> Entry:
        key = signing_key(site)
        if key is None:
            raise AdapterError("it was revoked during the round")
        expected = Statement(digest, site, task.round, task.nonce, result.content_digest())
        head = check_attestation(key, expected, result.attestation, study.name)
        return {AUDIT_HEAD: head_record(head)}

    return Admission(AllowedKeys(node_keys), prepare, [check], signing_keys)


def _is_signed(head: AuditHead, key: Ed25519PublicKey | None, study_name: str) -> bool:
    """Whether a site's present key signed a head."""
    if key is None:
        return False
    try:
        check_head(key, head, head.site, study_name)
    except SignatureError:
        return False
    return True
