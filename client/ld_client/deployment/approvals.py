"""What a person at the site has approved: a code bundle, a study and its packages, each by its hash.

Only the last approval counts. `ld_client.deployment.approve` writes approvals; nothing that a study runs can.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ld_client.deployment.site_home import SiteHome
from ld_common.core.errors import ApprovalError
from ld_common.core.registry import Registry
from ld_common.core.strict_json import read_json
from ld_common.protocol.foreign_packages import PackageRecord, check_installed, read_records, site_packages
from ld_common.protocol.keys import read_public_line
from ld_common.protocol.secagg.identities import Identity


@dataclass(frozen=True)
class Approval:
    """One person's approval of a study, with its code, base model and modality."""

    bundle: str
    """SHA-256 of the code bundle."""
    study: str
    base: str
    modality: str
    approved: str
    """Time; ISO 8601, UTC."""
    by: str
    """Account that gave it."""
    packages: list[dict[str, str]] = field(default_factory=list)
    """Fields of a `PackageRecord` for each package of others that the study uses."""
    site_keys: dict[str, str] = field(default_factory=dict)
    """Site -> public key of its signatures, of a study with secure aggregation."""

    @property
    def package_records(self) -> list[PackageRecord]:
        """`packages` as records."""
        return read_records(self.packages)


def approvals(home: SiteHome) -> list[Approval]:
    """Approvals that were not withdrawn, oldest first; raises `ApprovalError` for a file that cannot be read."""
    if not home.approvals.exists():
        return []
    try:
        if home.approvals.stat().st_mode & 0o022:
            raise ApprovalError(f"others may write '{home.approvals}': check its content, then run chmod 600 on it")
        entries = [Approval(**entry) for entry in read_json(home.approvals.read_text())]
        for entry in entries:
            read_records(entry.packages)
    except (OSError, ValueError, TypeError) as error:
        raise ApprovalError(f"cannot read '{home.approvals}': restore it, or remove it and approve again") from error
    return entries


def check_bundle(home: SiteHome, bundle_digest: str) -> None:
    """Raise `ApprovalError` unless the last approval is of this code bundle."""
    if bundle_digest not in {approval.bundle for approval in approvals(home)[-1:]}:
        raise ApprovalError(f"code bundle {bundle_digest[:16]} is not approved: review it with ld-client approve")


def check_approved(home: SiteHome, study_digest: str, base_digest: str, modality_digest: str) -> None:
    """Raise `ApprovalError` unless the last approval is of this study, base and modality, and its packages are here."""
    digests = (study_digest, base_digest, modality_digest)
    last = approvals(home)[-1:]
    if digests not in {(approval.study, approval.base, approval.modality) for approval in last}:
        raise ApprovalError(f"study {study_digest[:16]} is not approved: review it with ld-client approve")
    check_installed(last[0].package_records)


def approved_identity(home: SiteHome) -> Identity:
    """The site's signing key and those of the sites that it approved; raises `ApprovalError` without an approval."""
    last = approvals(home)[-1:]
    if not last:
        raise ApprovalError("no study is approved: review it with ld-client approve")
    return Identity({site: read_public_line(line) for site, line in last[0].site_keys.items()}, home.signing_key())


def allow_approved_packages(home: SiteHome | None) -> None:
    """Limit this process to the packages of the last approval, as they were approved.

    Without an approval no package of others may be loaded; without a home, as in a simulation, every one may.

    Raises:
        ApprovalError: an approved package is not installed, or differs from the approved one.
    """
    if home is None:
        return Registry.allow(None)
    Registry.allow(())
    for approval in approvals(home)[-1:]:
        check_installed(approval.package_records)
        Registry.allow(site_packages(approval.package_records))
    return None
