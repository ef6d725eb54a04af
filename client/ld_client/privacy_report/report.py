"""`ld-client privacy-report`: the page about one release that a data protection officer reads and signs.

It names no patient, pseudonym, file or folder, as it may be filed elsewhere. For a release without differential privacy
no ε is computed, so none can be shown.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from ld_client.audit.findings import AuditFinding, findings, read_audit
from ld_client.audit.run import Audit
from ld_client.privacy.ledger import Ledger
from ld_client.privacy_report.report_data import (
    BudgetSpent,
    DatasetSummary,
    PrivacyStatement,
    RoundParticipation,
    StudyUse,
    decimal,
    number,
    read_privacy_statement,
    round_participations,
    spent_budget,
    study_uses,
    summarize_dataset,
)
from ld_client.privacy_report.warnings import ledger_warnings, site_warnings, statement_warnings, withdrawal_warnings
from ld_client.site_config import SiteConfig
from ld_common.core.atomic_files import write_bytes
from ld_common.core.version import installed_version
from ld_common.protocol.secagg.messages import default_threshold
from ld_common.release.release import MANIFEST, Release

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class ReportFacts:
    """All numbers of the report, for one site and one release."""

    site: str
    study: str
    digest: str
    """Of the study."""
    statement: PrivacyStatement | None
    """The release's own; None without differential privacy, like `spent`."""
    spent: BudgetSpent | None
    studies: list[StudyUse]
    rounds: list[RoundParticipation]
    dataset: DatasetSummary
    audit: Audit | None
    findings: list[AuditFinding]
    warnings: list[str]
    """Points to weigh before the report is signed."""

    def to_mapping(self) -> dict[str, Any]:
        """The facts ready for JSON; the audit's pairs of pictures, which point to scans, are left out."""
        content = asdict(self)
        content.pop("audit")
        return content


def gather_facts(site: SiteConfig, release: Release, audit_file: Path | None) -> ReportFacts:
    """Read the ledger, the store and the audit.

    Raises:
        LdError: one of them cannot be read, this site took no part in the release, or the audit is of another release
            or site.
    """
    statement = read_privacy_statement(release)
    entries = Ledger(site.ledger_path).entries()
    digest = str(release.manifest["study_digest"])
    charged = [entry for entry in entries if entry.study_digest == digest]
    rounds = round_participations(site.site, release, charged)
    spent = None if statement is None else spent_budget(statement, site.policy.delta, entries, charged)
    studies = study_uses(entries, site.policy.delta if statement else None)
    dataset = summarize_dataset(site, release)
    audit = None if audit_file is None else read_audit(audit_file, site.site, release)
    results = [] if audit is None else findings(audit, None if statement is None else statement.epsilon)
    warnings = [
        *statement_warnings(site, statement, spent, dataset, studies),
        *ledger_warnings(rounds, charged, statement),
        *[finding.warning for finding in results if finding.warning],
        *site_warnings(site, dataset),
        *withdrawal_warnings(site, digest),
    ]
    return ReportFacts(
        site=site.site,
        study=release.study.name,
        digest=digest,
        statement=statement,
        spent=spent,
        studies=studies,
        rounds=rounds,
        dataset=dataset,
        audit=audit,
        findings=results,
        warnings=warnings,
    )


def write_privacy_report(
    site: SiteConfig, release: Release, release_folder: Path, audit_file: Path | None, out: Path
) -> ReportFacts:
    """Write the page, one HTML file that needs no other, and return its facts.

    Raises:
        LdError: as `gather_facts`, or the file cannot be written.
    """
    facts = gather_facts(site, release, audit_file)
    write_bytes(out, _render(facts, site, release, _hashes(release_folder, audit_file)).encode())
    return facts


def report_lines(facts: ReportFacts, out: Path) -> list[str]:
    """What the command prints."""
    return [*facts.warnings, f"wrote {out}: {len(facts.warnings)} points to weigh before it is signed"]


def _render(facts: ReportFacts, site: SiteConfig, release: Release, hashes: dict[str, str]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ld_client.privacy_report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(number=number, decimal=decimal, minute=_minute)
    sites = release.study.federation.sites
    return environment.get_template(TEMPLATE).render(
        facts=facts,
        site=site,
        release=release,
        study=release.study,
        manifest=release.manifest,
        base_name=release.base_name,
        hashes=hashes,
        version=installed_version(),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        parameters=sum(math.prod(tensor["shape"]) for tensor in release.manifest["tensors"].values()),
        odds=None if facts.statement is None else math.exp(facts.statement.epsilon),
        threshold=release.study.federation.secure_threshold or default_threshold(len(sites)),
    )


def _hashes(release_folder: Path, audit_file: Path | None) -> dict[str, str]:
    files = {"manifest.json": release_folder / MANIFEST, **({"audit.json": audit_file} if audit_file else {})}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def _minute(time: str) -> str:
    """`2026-07-01T09:30:00+00:00` as `2026-07-01 09:30`."""
    return time[:16].replace("T", " ")
