"""Gives and withdraws approvals, each written into the audit log."""

from __future__ import annotations

import dataclasses
import getpass
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ld_client.deployment.approvals import Approval, approvals
from ld_client.deployment.audit_log import AuditLog
from ld_client.deployment.bundle import read_bundle
from ld_client.deployment.site_home import SiteHome
from ld_common.core.atomic_files import write_bytes
from ld_common.core.config import load_config
from ld_common.core.errors import ApprovalError
from ld_common.core.registry import normalized
from ld_common.imaging.modality import Modality
from ld_common.protocol.enrollment_kit import BUNDLE, MODALITY, STUDY, KitManifest


def approve(home: SiteHome, shown: KitManifest | None = None) -> Approval:
    """Approve the kit of a home and log it. The bundle and the study are kept, to be compared with later ones.

    Args:
        home: the site's.
        shown: the manifest that a person reviewed; any other is refused.

    Raises:
        ApprovalError: the kit is not the reviewed one, its hashes are not those of its study and modality, the bundle
            holds a file that none may hold, or a package differs from the one installed here.
    """
    kit = home.kit()
    if shown is not None and kit != shown:
        raise ApprovalError("the kit was replaced during the review: run ld-client approve again")
    check_kit(home, kit)
    approval = Approval(
        kit.bundle_digest,
        kit.study_digest,
        kit.base_digest,
        kit.modality_digest,
        datetime.now(UTC).isoformat(timespec="seconds"),
        getpass.getuser(),
        kit.packages,
        kit.site_keys,
    )
    write_bytes(approved_copy(home, kit.bundle_digest, "fab"), (home.kit_folder / BUNDLE).read_bytes())
    write_bytes(approved_copy(home, kit.study_digest, "yaml"), (home.kit_folder / STUDY).read_bytes())
    AuditLog.of(home).append("approved", dataclasses.asdict(approval))
    _write(home, [*approvals(home), approval])
    return approval


def check_kit(home: SiteHome, kit: KitManifest) -> None:
    """Raise `ApprovalError` unless the manifest's hashes and packages are those of the files that a person reviews."""
    read_bundle((home.kit_folder / BUNDLE).read_bytes())
    study = home.study()
    digests = {"study": study.digest(), "modality": load_config(Modality, home.kit_folder / MODALITY).digest()}
    for kind, claimed in (("study", kit.study_digest), ("modality", kit.modality_digest)):
        if digests[kind] != claimed:
            raise ApprovalError(
                f"the kit's {kind} is not the one that its manifest names ({claimed[:16]}): it was made by another "
                "version of this software, or altered; ask the study for a new kit"
            )
    listed = {normalized(record.name) for record in kit.package_records}
    if listed != set(map(normalized, study.packages)):
        raise ApprovalError("the kit's manifest does not list the study's packages: ask the study for a new kit")
    if study.federation.secure_aggregation:
        _check_site_keys(home, kit, study.federation.sites)


def _check_site_keys(home: SiteHome, kit: KitManifest, sites: Sequence[str]) -> None:
    """Refuse a kit without the keys of all sites: its server could invent sites, and read this one's update."""
    missing = [site for site in sites if site not in kit.site_keys]
    if missing:
        raise ApprovalError(
            f"the study sums securely, and this kit lacks the keys of {', '.join(missing)}: ask the study for the kit "
            "that ld-server update writes once every site is admitted"
        )
    if kit.site_keys[kit.site] != home.public_keys().signing:
        raise ApprovalError(
            f"the kit names another key of '{kit.site}' than this site's: send the study the line that ld-client "
            "enroll prints, and ask for a new kit"
        )


def withdraw(home: SiteHome) -> None:
    """Withdraw every approval and log it; nothing runs afterwards."""
    _write(home, [])
    AuditLog.of(home).append("withdrawn", {})


def approved_copy(home: SiteHome, digest: str, ending: str) -> Path:
    """File of an approved bundle (`fab`) or study (`yaml`), which later ones are compared with."""
    return home.path / "approved" / f"{digest}.{ending}"


def _write(home: SiteHome, entries: list[Approval]) -> None:
    content = [dataclasses.asdict(entry) for entry in entries]
    write_bytes(home.approvals, (json.dumps(content, indent=2) + "\n").encode(), mode=0o600)
