"""`ld-client approve`: what would run, what would leave, and what differs from what was approved before."""

from __future__ import annotations

from collections.abc import Mapping

from ld_client.deployment.approvals import Approval, approvals, check_kit, kept_copy
from ld_client.deployment.bundle import difference, differing, packages_of, read_bundle
from ld_client.deployment.site_home import SiteHome
from ld_client.policy import check_study
from ld_common.core.atomic_files import write_bytes
from ld_common.core.command import visible
from ld_common.protocol.code_bundle import installed_sources
from ld_common.protocol.enrollment_kit import BUNDLE, STUDY, KitManifest
from ld_common.protocol.study_config import StudyConfig

SHOWN_LINES = 400


def describe(home: SiteHome) -> list[str]:
    """What would run and what would leave, and what differs from what was approved before."""
    kit, study, known = home.kit(), home.study(), approvals(home)
    check_kit(home, kit)
    lines = [f"study {kit.study} for site {kit.site}, from {kit.server}", ""]
    lines += ["What would run", *_running(home, kit, known), ""]
    lines += ["What it asks", *_asking(home, study, known, kit), ""]
    lines += ["What would leave", *_leaving(study)]
    return [visible(line) for line in lines]


def _running(home: SiteHome, kit: KitManifest, known: list[Approval]) -> list[str]:
    bundle = read_bundle((home.kit_folder / BUNDLE).read_bytes())
    ours, theirs = installed_sources(), packages_of(bundle)
    lines = [f"  code bundle {kit.bundle_digest[:16]}, {len(theirs)} source files of {kit.software}"]
    if differing(ours, theirs):
        lines.append("  it DIFFERS from the ld-client that is installed here, in:")
        lines += _shown(home, "installed", ours, theirs)
    else:
        lines.append("  byte for byte what is installed here")
    if known:
        kept = kept_copy(home, known[-1].bundle, "fab")
        before = read_bundle(kept.read_bytes()) if kept.exists() else {}
        same = before == bundle
        lines.append(f"  against what was approved on {known[-1].approved}:" + (" the same" if same else ""))
        lines += [] if same else _shown(home, "bundle", before, bundle)
    return lines


def _asking(home: SiteHome, study: StudyConfig, known: list[Approval], kit: KitManifest) -> list[str]:
    site = home.site()
    training, rounds = study.training, study.federation.rounds
    lines = [
        f"  {rounds} rounds of {training.steps} steps, adapter {study.adapter['name']}, drift {study.drift.shape}",
        "  base model " + kit.base_digest[:16] + ", modality " + kit.modality_digest[:16],
    ]
    check_study(site.policy, study)
    lines.append("  all of it within this site's policy")
    before = None if not known else kept_copy(home, known[-1].study, "yaml")
    if before is not None and before.exists():
        text = (home.kit_folder / STUDY).read_bytes()
        changed = _shown(home, "study", {STUDY: before.read_bytes()}, {STUDY: text})
        lines.append(f"  against what was approved on {known[-1].approved}:" + ("" if changed else " the same"))
        lines += changed
    return lines


def _leaving(study: StudyConfig) -> list[str]:
    """In words; `ld-client dry-run` shows the tensors themselves."""
    lines = []
    if study.federation.secure_aggregation:
        lines.append("  each round: this site's update and drift under a mask that only the sum of all sites removes")
    else:
        lines.append(f"  each round: the tensors that adapter {study.adapter['name']} learned, readable for the server")
        if study.drift.shape != "none":
            lines.append(f"  each round: the site's latent drift, of shape {study.drift.shape}")
    if study.withholds_numbers:
        lines.append("  no count of visits or patients, no loss")
    else:
        lines.append("  each round: the number of visits and patients, first and last loss, seconds")
        lines.append(
            "  each round: the ends of numbers (age) and the words (sex) that policy.min_patients patients share"
        )
    if study.privacy.enabled:
        planned = study.privacy_plan()
        lines.append(
            f"  under patient-level differential privacy: epsilon {planned.epsilon:.3g} at delta "
            f"{study.privacy.target_delta:g} over the whole study"
        )
    else:
        lines.append("  without differential privacy: no limit is proven on what it tells of a patient")
    return [*lines, "  never: a scan, a patient's identifier, a path, an error's text"]


def _shown(home: SiteHome, title: str, before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[str]:
    """The files that differ, all of them, and their lines as far as a screen bears; the rest is in a file."""
    names, lines = differing(before, after), difference(before, after)
    listed = [f"    {name}" for name in names]
    shown = [f"      {line}" for line in lines[:SHOWN_LINES]]
    if len(lines) > SHOWN_LINES:
        path = home.path / "approved" / f"{title}.diff"
        write_bytes(path, "\n".join([*lines, ""]).encode())
        shown.append(f"      ... and {len(lines) - SHOWN_LINES} lines more: read them all in {path}")
    return [*listed, *shown]
