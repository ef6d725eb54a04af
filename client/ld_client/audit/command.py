"""What `ld-client audit-privacy` does around the audit: finds both sides, writes the file, says what it means."""

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


def run_audit(site: SiteConfig, release: Release, out: Path, options: AuditOptions, progress: Progress) -> list[str]:
    """Audit a release, write `audit.json` for the site's eyes, and return what to say.

    Raises:
        LdError: no patients are held out, or a store or base that does not fit the release.
    """
    modality = load_modality(site)
    store = open_store(site.store_path, base_digest=base_digest(site.base_model), modality_digest=modality.digest())
    members, held_out = split_store(store, site.held_out)
    if not held_out.prompts or not members.prompts:
        raise AuditError(
            "an audit compares patients who were trained on with patients who were not, and this site holds none "
            f"back (held_out is {site.held_out:g}): set held_out, such as 0.2, before a study, not after it"
        )
    found = audit_release(site, members, held_out, release, options, progress)
    write_bytes(out / AUDIT, (json.dumps(found.to_mapping(), indent=1) + "\n").encode())
    (out / AUDIT).chmod(0o600)
    return [*_lines(found), f"wrote {out / AUDIT}, which points to scans: it must stay at the site"]


def _lines(audit: Audit) -> list[str]:
    promise = "with differential privacy" if audit.differential_privacy else "without differential privacy: no ε holds"
    lines = [f"study {audit.study}, {promise}"]
    for report in audit.membership:
        lines += _membership(report)
    copies = audit.copies
    lines.append(
        f"copies: {_shown(copies.nearer_to_training)} of drawn pictures lie nearer to a training patient than to a "
        f"held-out one; chance gives {copies.chance_low:.0%} to {copies.chance_high:.0%} (p = {copies.chance:.2g})"
    )
    if copies.closer_than_real is None:
        lines.append(f"  {copies.note}")
    else:
        real = f"{copies.quantile:.0%} of real pictures of others"
        lines.append(f"  {_shown(copies.closer_than_real)} lie nearer to a training picture than {real} do")
    return [*lines, *([] if audit.canaries is None else _canaries(audit.canaries))]


def _membership(report: MembershipReport) -> list[str]:
    area = report.area
    power = "" if area.smallest_detectable is None else f"; an AUC from {area.smallest_detectable:.2f} would show"
    lines = [
        f"membership by {report.attack}: AUC {area.value:.3f} ({area.low:.3f} to {area.high:.3f}; 0.5 is chance) for "
        f"{report.members} members and {report.held_out} others{power}"
    ]
    for point in report.operating_points:
        rate = f"  at {point.false_positive_rate:.1%} false positives: "
        lines.append(rate + (point.note if point.true_positive_rate is None else _shown(point.true_positive_rate)))
    return lines


def _canaries(bound: EpsilonBound) -> list[str]:
    found = "nothing is shown of the rehearsal's ε"
    if bound.epsilon > 0:
        found = (
            f"the rehearsal's ε at δ {bound.delta:g} is above {bound.epsilon:.2f}, at {bound.confidence:.0%} confidence"
        )
    return [
        f"canaries: {found}; {bound.correct} of {bound.guesses} guesses about {bound.canaries} of them were right, and "
        f"this test could have shown at most {bound.ceiling:.2f}"
    ]


def _shown(share: Share) -> str:
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"
