"""`ld-client privacy-report`: what a data protection officer reads and signs about one release.

The page names no patient, pseudonym, file or folder, as it may be filed elsewhere. For a release without differential
privacy nothing of an ε is computed, so none can be shown.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import jinja2

from ld_client.audit.findings import findings, read_audit
from ld_client.privacy.ledger import DRIFT, TRAINING, Ledger, LedgerEntry
from ld_client.privacy_report.report_data import (
    BudgetSpent,
    DatasetSummary,
    PrivacyStatement,
    RoundParticipation,
    StudyUse,
    holdings_of,
    number,
    own_rounds,
    read_promise,
    spent_on,
    study_uses,
)
from ld_client.site_config import SiteConfig
from ld_common.core.atomic_files import write_bytes
from ld_common.protocol.code_bundle import installed_version
from ld_common.protocol.secagg.messages import default_threshold
from ld_common.release.release import MANIFEST, Release

TEMPLATE = "report.html.j2"
TOLERANCE = 1e-3
"""Relative difference up to which two computations of an ε agree."""


def write_privacy_report(
    site: SiteConfig, release: Release, release_folder: Path, audit_file: Path | None, out: Path
) -> list[str]:
    """Write the page, one HTML file that needs nothing else, and return what to say.

    Raises:
        LdError: the ledger, the store or the audit cannot be read; this site took no part in the release;
            the audit is of another release or site.
    """
    promise = read_promise(release)
    entries = Ledger(site.ledger_path).entries()
    digest = str(release.manifest["study_digest"])
    own = [entry for entry in entries if entry.study_digest == digest]
    rounds = own_rounds(site.site, release, own)
    spent = None if promise is None else spent_on(promise, site.policy.delta, entries, own)
    studies = study_uses(entries, site.policy.delta if promise else None)
    holdings = holdings_of(site, release)
    audit = None if audit_file is None else read_audit(audit_file, site.site, release)
    found = [] if audit is None else findings(audit, None if promise is None else promise.epsilon)
    warnings = [
        *_promise_warnings(site, promise, spent, holdings, studies),
        *_ledger_warnings(rounds, own, promise),
        *[finding.warning for finding in found if finding.warning],
        *_site_warnings(site, holdings),
    ]
    sites = release.study.federation.sites
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ld_client.privacy_report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(number=number, decimal=_decimal, minute=_minute)
    page = environment.get_template(TEMPLATE).render(
        site=site,
        release=release,
        study=release.study,
        manifest=release.manifest,
        base_name=release.base_name,
        hashes=_hashes(release_folder, audit_file),
        version=installed_version(),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        parameters=sum(math.prod(tensor["shape"]) for tensor in release.manifest["tensors"].values()),
        promise=promise,
        odds=None if promise is None else math.exp(promise.epsilon),
        spent=spent,
        studies=studies,
        digest=digest,
        rounds=rounds,
        holdings=holdings,
        audit=audit,
        findings=found,
        warnings=warnings,
        threshold=release.study.federation.secure_threshold or default_threshold(len(sites)),
    )
    write_bytes(out, page.encode())
    return [*warnings, f"wrote {out}: {len(warnings)} points to weigh before it is signed"]


def _promise_warnings(
    site: SiteConfig,
    promise: PrivacyStatement | None,
    spent: BudgetSpent | None,
    holdings: DatasetSummary,
    studies: Sequence[StudyUse],
) -> list[str]:
    if promise is None or spent is None:
        return [
            "The study ran without differential privacy: nothing bounds what its release reveals of a patient, and "
            "pictures that it generates may show training patients."
        ]
    said, policy = [], site.policy
    if spent.recomputed > promise.epsilon * (1 + TOLERANCE):
        said.append(
            f"The release states ε {number(promise.epsilon)}, but its noise, sampling rate and steps give "
            f"{number(spent.recomputed)}: do not sign before the server has explained it."
        )
    if spent.this_study > promise.epsilon * (1 + TOLERANCE):
        said.append(
            f"This site's ledger holds ε {number(spent.this_study)} for this study, more than the "
            f"{number(promise.epsilon)} that the release states: rounds that ran again were charged again, and what "
            "they sent may have left. For this site the ledger's number holds."
        )
    if spent.total > policy.max_epsilon:
        said.append(
            f"All studies together have cost ε {number(spent.total)}, above the site's limit "
            f"{number(policy.max_epsilon)}: the limit or its δ was changed afterwards."
        )
    patients = holdings.trained_patients
    for delta in sorted({promise.delta, policy.delta}):
        if delta * patients >= 1:
            said.append(f"δ {_decimal(delta)} is not below one in {patients:,} patients: one of them might be shown.")
    outside = [use.name for use in studies if not use.charges]
    if outside:
        said.append(
            f"Studies without differential privacy used the same patients ({', '.join(outside)}): no ε in this report "
            "covers them."
        )
    return said


def _ledger_warnings(
    rounds: Sequence[RoundParticipation], own: Sequence[LedgerEntry], promise: PrivacyStatement | None
) -> list[str]:
    if not own:
        return [
            "The site's ledger holds nothing of this study, though the site took part: it was lost, replaced, or this "
            "is another data set's. Restore it from a backup before anything else trains."
        ]
    missing = [str(one.number) for one in rounds if one.sent_bytes is not None and not one.charged]
    if missing:
        return [f"The ledger holds no charge for round {', '.join(missing)}, in which the site sent an update."]
    sent = any(one.sent_bytes is not None for one in rounds)
    said, charges = [], [one.charge for one in own if one.purpose == TRAINING and one.charge]
    if promise and promise.drift_noise_multiplier is not None and sent and all(one.purpose != DRIFT for one in own):
        said.append("The release has a noised drift of this site, and the ledger holds no charge for it.")
    if promise and any(one.noise_multiplier > promise.noise_multiplier * (1 + TOLERANCE) for one in charges):
        said.append("The ledger was charged for more noise than the release states: it holds less than was spent.")
    return said


def _site_warnings(site: SiteConfig, holdings: DatasetSummary) -> list[str]:
    said = []
    if site.held_out == 0:
        said.append(
            "The site holds no patients back (held_out is 0), so nobody can test whether this release gives training "
            "patients away. It must be set before a study, not after it."
        )
    if not holdings.same_study:
        said.append(
            "The store was indexed again for another base model or modality: its numbers are not those of this study."
        )
    return said


def _hashes(release_folder: Path, audit_file: Path | None) -> dict[str, str]:
    files = {"manifest.json": release_folder / MANIFEST, **({"audit.json": audit_file} if audit_file else {})}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def _decimal(value: float) -> str:
    """A small number without an exponent: 0.00001."""
    return f"{value:.15f}".rstrip("0")


def _minute(time: str) -> str:
    """`2026-07-01T09:30:00+00:00` as `2026-07-01 09:30`."""
    return time[:16].replace("T", " ")
