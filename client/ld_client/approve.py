"""`ld-client approve`: what would run, what would leave, and what differs from what was approved before."""

from __future__ import annotations

import difflib
import importlib.util
import io
import zipfile
from pathlib import Path

from ld_client.approvals import Approval, approvals, kept_copy
from ld_client.policy import check_study
from ld_client.site_home import SiteHome
from ld_common.errors import DeploymentError
from ld_common.site_kit import BUNDLE, STUDY, KitManifest
from ld_common.study import StudyConfig

PACKAGES = ("ld_common", "ld_client")
MAX_DIFFERENCE_LINES = 400


def describe(home: SiteHome) -> list[str]:
    """What would run and what would leave, and what differs from what was approved before."""
    kit, study, known = home.kit(), home.study(), approvals(home)
    lines = [f"study {kit.study} for site {kit.site}, from {kit.server}", ""]
    lines += ["What would run", *_running(home, kit, known), ""]
    lines += ["What it asks", *_asking(home, study, known, kit), ""]
    return [*lines, "What would leave", *_leaving(study)]


def _running(home: SiteHome, kit: KitManifest, known: list[Approval]) -> list[str]:
    bundle = _sources((home.kit_folder / BUNDLE).read_bytes())
    installed = _difference(_installed(), {name: text for name, text in bundle.items() if _is_package(name)})
    lines = [f"  code bundle {kit.bundle_digest[:16]}, {len(bundle)} files of {kit.software}"]
    if installed:
        lines += ["  it DIFFERS from the ld-client that is installed here:", *installed]
    else:
        lines.append("  its ld_common and ld_client are, byte for byte, what is installed here")
    if known:
        before = kept_copy(home, known[-1].bundle, "fab")
        changed = _difference(_sources(before.read_bytes()), bundle) if before.exists() else ["  (no copy was kept)"]
        lines.append(f"  against what was approved on {known[-1].approved}:" + ("" if changed else " the same"))
        lines += changed
    return lines


def _asking(home: SiteHome, study: StudyConfig, known: list[Approval], kit: KitManifest) -> list[str]:
    site = home.site()
    training, rounds = study.training, study.federation.rounds
    lines = [
        f"  {rounds} rounds of {training.steps} steps, scheme {study.scheme['name']}, drift {study.drift.mean}",
        "  base model " + kit.base_digest[:16] + ", modality " + kit.modality_digest[:16],
    ]
    check_study(site.policy, study)
    lines.append("  all of it within this site's policy")
    before = None if not known else kept_copy(home, known[-1].study, "yaml")
    if before is not None and before.exists():
        text = (home.kit_folder / STUDY).read_text()
        changed = _difference({STUDY: before.read_text()}, {STUDY: text})
        lines.append(f"  against what was approved on {known[-1].approved}:" + ("" if changed else " the same"))
        lines += changed
    return lines


def _leaving(study: StudyConfig) -> list[str]:
    """In words; `ld-client dry-run` shows the tensors themselves."""
    lines = []
    if study.federation.secure_aggregation:
        lines.append("  each round: this site's update and drift under a mask that only the sum of all sites removes")
    else:
        lines.append(f"  each round: the tensors that scheme {study.scheme['name']} learned, readable for the server")
        if study.drift.mean != "none":
            lines.append(f"  each round: the site's latent drift, of shape {study.drift.mean}")
    if study.withholds_numbers:
        lines.append("  no count of visits or patients, no loss")
    else:
        lines.append("  each round: the number of visits and patients, first and last loss, seconds")
    if study.privacy.enabled:
        planned = study.privacy_plan()
        lines.append(
            f"  under differential privacy by patient: epsilon {planned.epsilon:.3g} at delta {study.privacy.delta:g} "
            "over the whole study"
        )
    else:
        lines.append("  without differential privacy: no limit is proven on what it tells of a patient")
    return [*lines, "  never: a scan, a patient's identifier, a path, an error's text"]


def _sources(bundle: bytes) -> dict[str, str]:
    """The files of a bundle, as text; raises `DeploymentError`."""
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            names = [name for name in archive.namelist() if not name.startswith(".info/")]
            return {name: archive.read(name).decode(errors="replace") for name in sorted(names)}
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise DeploymentError("the kit's code bundle is no archive: ask the study for the kit again") from error


def _installed() -> dict[str, str]:
    files = {}
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        for place in [] if found is None else found.submodule_search_locations or []:
            for source in sorted(Path(place).rglob("*.py")):
                files[f"{package}/{source.relative_to(place).as_posix()}"] = source.read_text()
    return files


def _is_package(name: str) -> bool:
    return name.split("/")[0] in PACKAGES


def _difference(before: dict[str, str], after: dict[str, str]) -> list[str]:
    lines: list[str] = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, ""), after.get(name, "")
        if old != new:
            lines += difflib.unified_diff(
                old.splitlines(), new.splitlines(), f"before/{name}", f"now/{name}", lineterm=""
            )
    shown = [f"    {line}" for line in lines[:MAX_DIFFERENCE_LINES]]
    more = len(lines) - len(shown)
    return [*shown, f"    ... and {more} lines more: unpack both bundles to see them"] if more else shown
