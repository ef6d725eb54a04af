"""`ld-client audit-privacy`: audits a release with the site's patients, writes `audit.json` and summarises it."""

from __future__ import annotations

import json
from pathlib import Path

from ld_client.audit.membership import MembershipReport
from ld_client.audit.one_run import EpsilonBound
from ld_client.audit.run import Audit, AuditOptions, Progress, audit_release
from ld_client.audit.statistics import AuditError, Share
from ld_client.data.store import open_store, split_store
from ld_client.site_config import SiteConfig, load_modality
from ld_common.core.atomic_files import write_bytes
from ld_common.diffusion.base_model import base_digest
from ld_common.release.release import Release

AUDIT = "audit.json"


def run_audit(site: SiteConfig, release: Release, out: Path, options: AuditOptions, progress: Progress) -> Audit:
    """Audit a release and write `audit.json`, which points to scans and must stay at the site.

    Raises:
        AuditError: no patients are held out, or too few.
        LdError: the store, the base or the folder `out` cannot be used.
    """
    modality = load_modality(site)
    store = open_store(site.store_path, base_digest=base_digest(site.base_model), modality_digest=modality.digest())
    members, held_out = split_store(store, site.held_out, release.study.privacy.enabled)
    if not held_out.prompts or not members.prompts:
        raise AuditError(
            "an audit compares patients who were trained on with patients who were not, but this site has "
            f"{members.patients} and {held_out.patients} (held_out is {site.held_out:g}): set held_out, such as 0.2, "
            "before a study, not after it"
        )
    audit = audit_release(site, members, held_out, release, options, progress)
    write_bytes(out / AUDIT, (json.dumps(audit.to_mapping(), indent=1) + "\n").encode(), mode=0o600)
    return audit


def audit_lines(audit: Audit) -> list[str]:
    """The audit as text."""
    privacy = "with differential privacy" if audit.differential_privacy else "without differential privacy: no ε holds"
    counts = f"{audit.membership[0].members} patients trained on, {audit.membership[0].held_out} held out"
    lines = [f"study {audit.study}, {privacy}; {counts}"]
    for report in audit.membership:
        lines += _membership(report)
    copies = audit.copies
    lines.append(
        f"copies: {_shown(copies.nearer_to_training)} of generated images lie nearer to a training patient than to a "
        f"held-out one; by chance {copies.chance_low:.0%} to {copies.chance_high:.0%} (p = {copies.chance:.2g})"
    )
    if copies.closer_than_real is None:
        lines.append(f"  {copies.note}")
    else:
        lines.append(
            f"  {_shown(copies.closer_than_real)} lie nearer to a training image than {copies.quantile:.0%} of real "
            "images of other patients do"
        )
    return [*lines, *([] if audit.canaries is None else _canaries(audit.canaries))]


def _membership(report: MembershipReport) -> list[str]:
    area = report.area
    power = "" if area.smallest_detectable is None else f"; detectable from an AUC of {area.smallest_detectable:.2f}"
    lines = [
        f"membership by {report.attack}: AUC {area.value:.3f} ({area.low:.3f} to {area.high:.3f}; 0.5 is chance) for "
        f"{report.members} members and {report.held_out} others{power}"
    ]
    for point in report.operating_points:
        rate = f"  at {point.false_positive_rate:.1%} false positives: "
        lines.append(rate + (point.note if point.true_positive_rate is None else _shown(point.true_positive_rate)))
    return lines


def _canaries(bound: EpsilonBound) -> list[str]:
    result = "no lower bound on the rehearsal's ε"
    if bound.epsilon > 0:
        result = (
            f"the rehearsal's ε at δ {bound.delta:g} is above {bound.epsilon:.2f}, at {bound.confidence:.0%} confidence"
        )
    return [
        f"canaries: {result}; {bound.correct} of {bound.guesses} guesses about {bound.canaries} canaries were right; "
        f"the largest bound that this test can show is {bound.ceiling:.2f}"
    ]


def _shown(share: Share) -> str:
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"
