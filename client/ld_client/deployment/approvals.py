"""What a person at the site has approved: a code bundle, a study and its packages, each by its hash.

Only the last approval counts. `ld_client.deployment.approve` writes approvals; nothing that a study runs can.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from ld_client.deployment.audit_log import last_entry
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


def last_approval(home: SiteHome) -> Approval | None:
    """The approval that counts, or None.

    Raises:
        ApprovalError: it is not the one that the audit log has last: the list was put back from an older copy.
    """
    last = approvals(home)[-1:]
    if not last:
        return None
    logged = last_entry(home.audit_log, {"approved", "withdrawn"})
    details = None if logged is None else {name: logged.details.get(name) for name in vars(last[0])}
    if logged is None or logged.event != "approved" or details != asdict(last[0]):
        raise ApprovalError(
            f"the last approval in '{home.approvals}' is not the last one in the audit log: it was put back from an "
            "older copy, or an approval was interrupted; review and approve again with ld-client approve"
        )
    return last[0]


def check_bundle(home: SiteHome, bundle_digest: str) -> None:
    """Raise `ApprovalError` unless the last approval is of this code bundle."""
    last = last_approval(home)
    if last is None or last.bundle != bundle_digest:
        raise ApprovalError(f"code bundle {bundle_digest[:16]} is not approved: review it with ld-client approve")


def check_approved(home: SiteHome, study_digest: str, base_digest: str, modality_digest: str) -> None:
    """Raise `ApprovalError` unless the last approval is of this study, base and modality, and its packages are here."""
    last = last_approval(home)
    if last is None or (last.study, last.base, last.modality) != (study_digest, base_digest, modality_digest):
        raise ApprovalError(f"study {study_digest[:16]} is not approved: review it with ld-client approve")
    check_installed(last.package_records)


def approved_identity(home: SiteHome) -> Identity:
    """The site's signing key and those of the sites that it approved; raises `ApprovalError` without an approval."""
    last = last_approval(home)
    if last is None:
        raise ApprovalError("no study is approved: review it with ld-client approve")
    return Identity({site: read_public_line(line) for site, line in last.site_keys.items()}, home.signing_key())


def allow_approved_packages(home: SiteHome | None) -> None:
    """Limit this process to the packages of the last approval, as they were approved.

    Without an approval no package of others may be loaded; without a home, as in a simulation, every one may.

    Raises:
        ApprovalError: an approved package is not installed, or differs from the approved one.
    """
    if home is None:
        return Registry.allow(None)
    Registry.allow(())
    approval = last_approval(home)
    if approval is not None:
        check_installed(approval.package_records)
        Registry.allow(site_packages(approval.package_records))
    return None
