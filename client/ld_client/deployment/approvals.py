"""What may run at a site is the site's word: a bundle of code and a study, each by its hash, approved by a person."""

from __future__ import annotations

import dataclasses
import getpass
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ld_client.deployment.audit_log import AuditLog
from ld_client.deployment.bundle import read_bundle
from ld_client.deployment.site_home import SiteHome
from ld_common.core.atomic_files import write_bytes
from ld_common.core.config import load_config
from ld_common.core.errors import ApprovalError
from ld_common.imaging.modality import Modality
from ld_common.protocol.enrollment_kit import BUNDLE, MODALITY, STUDY, KitManifest


@dataclass(frozen=True)
class Approval:
    """What one person allowed: this code with this study on this base and modality."""

    bundle: str
    """SHA-256 of the code bundle."""
    study: str
    base: str
    modality: str
    approved: str
    """When; ISO 8601, UTC."""
    by: str
    """The account that typed it."""


def approvals(home: SiteHome) -> list[Approval]:
    """What was approved and not withdrawn, oldest first; raises `ApprovalError` for a file that cannot be read."""
    if not home.approvals.exists():
        return []
    try:
        if home.approvals.stat().st_mode & 0o022:
            raise ApprovalError(f"others may write '{home.approvals}': read it, then run chmod 600 on it")
        return [Approval(**entry) for entry in json.loads(home.approvals.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise ApprovalError(f"cannot read '{home.approvals}': restore it, or remove it and approve again") from error


def approve(home: SiteHome, seen: KitManifest | None = None) -> Approval:
    """Allow the kit that lies in the home, and log it; the bundle is kept, for the next comparison.

    Args:
        home: the site's.
        seen: the kit that a person looked at; another one in its place is refused.

    Raises:
        ApprovalError: the kit is not the one that was seen, its hashes are not those of its study and modality, or
            the bundle holds what none may hold.
    """
    kit = home.kit()
    if seen is not None and kit != seen:
        raise ApprovalError("another kit was opened meanwhile: look at it first")
    check_kit(home, kit)
    approval = Approval(
        kit.bundle_digest,
        kit.study_digest,
        kit.base_digest,
        kit.modality_digest,
        datetime.now(UTC).isoformat(timespec="seconds"),
        getpass.getuser(),
    )
    write_bytes(kept_copy(home, kit.bundle_digest, "fab"), (home.kit_folder / BUNDLE).read_bytes())
    write_bytes(kept_copy(home, kit.study_digest, "yaml"), (home.kit_folder / STUDY).read_bytes())
    AuditLog.of(home).append("approved", dataclasses.asdict(approval))
    _write(home, [*approvals(home), approval])
    return approval


def check_kit(home: SiteHome, kit: KitManifest) -> None:
    """Raise `ApprovalError` unless the kit's hashes are those of the files that a person is shown."""
    read_bundle((home.kit_folder / BUNDLE).read_bytes())
    digests = {"study": home.study().digest(), "modality": load_config(Modality, home.kit_folder / MODALITY).digest()}
    for what, claimed in (("study", kit.study_digest), ("modality", kit.modality_digest)):
        if digests[what] != claimed:
            raise ApprovalError(
                f"the kit's {what} is not the one that its manifest names ({claimed[:16]}): it was made by another "
                "version of this software, or to deceive; ask the study for it again"
            )


def withdraw(home: SiteHome) -> None:
    """Take every approval back, and log it: nothing runs from now on."""
    _write(home, [])
    AuditLog.of(home).append("withdrawn", {})


def check_bundle(home: SiteHome, bundle_digest: str) -> None:
    """Raise `ApprovalError` unless this code is what was approved last."""
    if bundle_digest not in {approval.bundle for approval in approvals(home)[-1:]}:
        raise ApprovalError(f"code bundle {bundle_digest[:16]} is not approved here: see ld-client approve")


def check_approved(home: SiteHome, study_digest: str, base_digest: str, modality_digest: str) -> None:
    """Raise `ApprovalError` unless this study, on this base and modality, is what was approved last."""
    asked = (study_digest, base_digest, modality_digest)
    if asked not in {(one.study, one.base, one.modality) for one in approvals(home)[-1:]}:
        raise ApprovalError(f"study {asked[0][:16]} is not approved here: see ld-client approve")


def kept_copy(home: SiteHome, digest: str, ending: str) -> Path:
    """Where the bundle (`fab`) or study (`yaml`) of an approval is kept, for the next comparison."""
    return home.path / "approved" / f"{digest}.{ending}"


def _write(home: SiteHome, entries: list[Approval]) -> None:
    content = [dataclasses.asdict(entry) for entry in entries]
    write_bytes(home.approvals, (json.dumps(content, indent=2) + "\n").encode(), mode=0o600)
