"""`ld-client approve`: what a study would run and send, and how it differs from what was approved before."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from ld_client.deployment.approvals import Approval, approvals
from ld_client.deployment.approve import approved_copy, check_kit
from ld_client.deployment.bundle import diff_lines, differing_files, package_files, read_bundle
from ld_client.deployment.site_home import SiteHome
from ld_client.policy import check_study
from ld_client.site_config import PolicyConfig
from ld_common.core.atomic_files import write_bytes
from ld_common.core.command import printable
from ld_common.core.config import load_config, to_mapping
from ld_common.imaging.modality import Modality
from ld_common.protocol.code_bundle import bundle_unreached_lines, installed_sources
from ld_common.protocol.enrollment_kit import BUNDLE, MODALITY, STUDY, KitManifest
from ld_common.protocol.foreign_packages import SITES
from ld_common.protocol.keys import fingerprint, read_public_line
from ld_common.protocol.study_config import StudyConfig

MAX_DIFF_LINES = 400


def summary_lines(home: SiteHome) -> list[str]:
    """What would run and what would leave, and what differs from the last approval.

    Raises:
        ApprovalError: the kit contradicts itself, or a package that the study needs is not installed here.
        PolicyError: the study asks for more than the site's policy allows.
    """
    kit, study, earlier = home.kit(), home.study(), approvals(home)
    check_kit(home, kit)
    lines = [f"study {kit.study} for site {kit.site}, from {kit.server}", ""]
    lines += ["What would run", *_running(home, kit, earlier), *_packages(kit, earlier), ""]
    if study.federation.secure_aggregation:
        lines += ["Whose updates would be summed with this site's", *_summed_sites(kit, earlier), ""]
    lines += ["What the study asks for", *_requests(home, study, earlier, kit), ""]
    modality = load_config(Modality, home.kit_folder / MODALITY)
    lines += ["What would leave the site", *_leaving(study, modality, home.site().policy)]
    return [printable(line) for line in lines]


def _running(home: SiteHome, kit: KitManifest, earlier: list[Approval]) -> list[str]:
    bundle = read_bundle((home.kit_folder / BUNDLE).read_bytes())
    installed, sent = installed_sources(), package_files(bundle)
    lines = [f"  code bundle {kit.bundle_digest[:16]}, {len(sent)} source files of {kit.software}"]
    unreached = bundle_unreached_lines(sent)
    if unreached:
        lines.append(f"  {unreached} of its lines are never imported by its ClientApp: ask the study why it sends them")
    if differing_files(installed, sent):
        lines.append("  it DIFFERS from the ld-client that is installed here, in:")
        lines += _difference(home, "installed", installed, sent)
    else:
        lines.append("  byte for byte the code that is installed here")
    if earlier:
        copy = approved_copy(home, earlier[-1].bundle, "fab")
        before = read_bundle(copy.read_bytes()) if copy.exists() else {}
        same = before == bundle
        lines.append(f"  compared with the approval of {earlier[-1].approved}:" + (" the same" if same else ""))
        lines += [] if same else _difference(home, "bundle", before, bundle)
    return lines


def _packages(kit: KitManifest, earlier: list[Approval]) -> list[str]:
    """Packages of others; the bundle holds none of their code, and `home.study()` has compared them."""
    approved = {record.name: record for record in (earlier[-1].package_records if earlier else [])}
    lines = []
    for record in kit.package_records:
        place = "as it is installed here" if record.runs_at == SITES else "runs at the server only"
        lines.append(f"  package {record.name} {record.version}, sha256 {record.sha256[:16]}, {place}")
        before = approved.get(record.name)
        if before is not None and before != record:
            lines.append(f"    it DIFFERS from the approved version {before.version}, sha256 {before.sha256[:16]}")
        elif before is None and earlier:
            lines.append("    it is NEW since the last approval")
    return lines


def _summed_sites(kit: KitManifest, earlier: list[Approval]) -> list[str]:
    """The sites that hide this one's update, with the keys by which it knows them."""
    lines, before = [], earlier[-1].site_keys if earlier else {}
    for site, line in sorted(kit.site_keys.items()):
        change = "" if not before or before.get(site) == line else "  NEW KEY since the last approval"
        own = "  (this site)" if site == kit.site else ""
        lines.append(f"  {site}: {fingerprint(read_public_line(line))}{own}{change}")
    lines.append("  an invented site hides nothing: ask the others by telephone what their ld-client enroll printed")
    return lines


def _requests(home: SiteHome, study: StudyConfig, earlier: list[Approval], kit: KitManifest) -> list[str]:
    site = home.site()
    training, rounds = study.training, study.federation.rounds
    lines = [
        f"  {rounds} rounds of {training.steps} steps of {training.batch_size} visits, learning rate "
        f"{training.learning_rate:g}, adapter {study.adapter['name']}, drift {study.drift.shape}",
        f"  base model {kit.base_digest[:16]}, modality {kit.modality_digest[:16]}",
    ]
    check_study(site.policy, study)
    lines.append("  all of it within this site's policy")
    before = None if not earlier else approved_copy(home, earlier[-1].study, "yaml")
    if before is not None and before.exists():
        text = (home.kit_folder / STUDY).read_bytes()
        changes = _difference(home, "study", {STUDY: before.read_bytes()}, {STUDY: text})
        lines.append(f"  compared with the approval of {earlier[-1].approved}:" + ("" if changes else " the same"))
        lines += changes
    else:
        lines.append("  the whole study, with the defaults of what its file does not name:")
        lines += [f"    {line}" for line in yaml.safe_dump(to_mapping(study), sort_keys=False).splitlines()]
    return lines


def _leaving(study: StudyConfig, modality: Modality, policy: PolicyConfig) -> list[str]:
    """A summary; `ld-client dry-run` lists the tensors."""
    lines = []
    if study.federation.secure_aggregation:
        lines.append("  each round: this site's update and drift under masks that cancel in the sum of all sites")
        lines.append("  each round: public keys, and encrypted shares of the secrets behind the masks")
    else:
        lines.append(f"  each round: the trained tensors of adapter {study.adapter['name']}, readable by the server")
        if study.drift.shape not in ("none", "longitudinal"):
            image = ", a mean image" if study.drift.shape in ("map", "conditional") else ""
            lines.append(f"  each round: the site's latent drift, of shape {study.drift.shape}{image}")
    lines += [*sums_leaving(study), *_own_part(study, policy)]
    if study.withholds_numbers:
        lines.append("  no number of visits or patients, no loss")
    else:
        lines.append(
            "  each round: the number of visits and patients, in multiples of policy.count_step, the first and the "
            "last loss, the seconds"
        )
        for name, config in modality.attributes.items():
            values = ", ".join(config.categories)
            what = f"which of {values} are there" if values else "the lowest and the highest, rounded outwards"
            lines.append(f"  each round, of {name}: {what}, as far as at least policy.min_patients patients have it")
        if study.validates:
            lines.append(
                "  after each round, from a site that holds patients out: the new adapter's loss on them, and how well "
                "the study's drift predicts their last visits"
            )
        lines.append("  the release publishes these numbers of each round")
    lines.append("  each round: the site's name, its signature, its audit log's head (a number, a time, a salted hash)")
    if study.privacy.enabled:
        planned = study.privacy_plan()
        lines.append(
            f"  under patient-level differential privacy: epsilon {planned.epsilon:.3g} at delta "
            f"{study.privacy.target_delta:g} over the whole study; a patient whom another site knows "
            "too pays there as well"
        )
    else:
        lines.append("  without differential privacy: nothing bounds what the update reveals about a patient")
    lines.append("  after an error: its code, one of a fixed list")
    return [*lines, "  never: a scan, a patient's identifier, a path, the text of an error"]


def _own_part(study: StudyConfig, policy: PolicyConfig) -> list[str]:
    """Whether the factors leave that the study lets each site keep."""
    if not study.leaves_parts:
        return []
    if policy.release_own_part:
        return [
            "  each round: the factors that are this site's own, readable by the server and in the release under the "
            "site's name"
        ]
    return ["  not: the factors that are this site's own, since policy.release_own_part is false"]


def sums_leaving(study: StudyConfig) -> list[str]:
    """What a longitudinal drift sends, in plain words."""
    if study.drift.shape != "longitudinal":
        return []
    privacy = study.privacy
    if privacy.enabled:
        return [
            "  once, the same in each round: sums over patients of products of their latents, attributes and years "
            f"between visits; each patient's share is cut to norm {privacy.drift_clip_norm:g}, and noise of "
            f"{privacy.drift_noise_multiplier:g} times that norm is added: the epsilon below covers it"
        ]
    return [
        "  first round: a sketch of the latents, their sum and the main directions in which visits differ",
        "  later rounds: sums over visits of products of latents, attributes and years between visits, which are "
        "means and covariances of the site's scans; those of few patients can show a scan's latents "
        "(policy.min_patients bounds from below how many patients have two visits)",
    ]


def _difference(home: SiteHome, title: str, before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[str]:
    """All files that differ, and up to `MAX_DIFF_LINES` lines of their differences; a file holds the rest."""
    names, lines = differing_files(before, after), diff_lines(before, after)
    listed = [f"    {name}" for name in names]
    listed += [f"      {line}" for line in lines[:MAX_DIFF_LINES]]
    if len(lines) > MAX_DIFF_LINES:
        path = home.path / "approved" / f"{title}.diff"
        write_bytes(path, "\n".join([*lines, ""]).encode())
        listed.append(f"      ... and {len(lines) - MAX_DIFF_LINES} more lines: {path} holds all of them")
    return listed
