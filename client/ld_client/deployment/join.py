"""Joins a study: opens its kit, makes the site's key, prints its public key."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

from ld_client.deployment.audit_log import head_file
from ld_client.deployment.site_home import SiteHome
from ld_common.core.atomic_files import write_bytes
from ld_common.core.config import load_config
from ld_common.core.errors import DeploymentError
from ld_common.imaging.modality import Modality
from ld_common.protocol.enrollment_kit import MANIFEST, MODALITY, SIGNATURE, KitManifest
from ld_common.protocol.keys import fingerprint, read_public_line, write_private_key
from ld_common.protocol.kit_archive import Kit, read_kit
from ld_common.protocol.site_keys import enrolment_line, new_site_keys

TEMPLATE = """\
# The site's config for a study. Paths are relative to this folder; ld-client check --home HERE finds what is missing.
site: {site}
modality: kit/modality.yaml
base_model: /path/of/the/base/model     # the study's base, compared by hash: sha256 {base}...
store: store                            # index, latents, pseudonyms' key, privacy ledger: never leaves
held_out: 0.2                           # share of patients never trained on, for ld-client audit-privacy
device: cpu                             # or cuda
data:
  root: /path/of/the/scans
  table: /path/of/visits.csv            # one row a visit, UTF-8; dates as 2026-11-23, or set date_format: "%d.%m.%Y"
  columns:
    patient: patient
    date: date
    file: ""                            # column with a scan's path; empty if all scans are DICOM series
    attributes: {{{attributes}}}        # the study's name: this table's column
  values: {{}}                            # translates values to the study's: sex: {{Male: M, Female: F}}
policy:                                 # limits for every study
  min_patients: 10
  private_only: false                   # true: only studies under differential privacy
  max_epsilon: 10.0                     # privacy budget of all studies together
"""


def join(kit_file: Path, path: Path, expected: str = "") -> list[str]:
    """Open a kit in a site's home, new or of the same study; returns lines for the data manager.

    Args:
        kit_file: the study's kit.
        path: the home; only an earlier kit in it is replaced.
        expected: the study's fingerprint, as its team said by telephone. A home that has a kit knows its signer.

    Raises:
        DeploymentError: the kit was altered, is of another study or site than the home, or of a signer whom nobody
            vouched for.
    """
    kit, home = read_kit(kit_file), SiteHome(path.resolve())
    signer = fingerprint(read_public_line(kit.manifest.public_key))
    if expected and expected != signer:
        raise DeploymentError(f"this kit was signed by {signer}, not by {expected}: do not use it")
    reopened = (home.kit_folder / MANIFEST).exists()
    if not reopened and not expected:
        raise DeploymentError(
            "anyone can make a kit: ask the study's team by telephone for the study's fingerprint, and give it with "
            "--fingerprint SHA256:..."
        )
    if reopened:
        before = _current_manifest(home)
        for key in ("public_key", "site", "study"):
            if getattr(before, key) != getattr(kit.manifest, key):
                raise DeploymentError(
                    f"'{path}' is of another {key.replace('_', ' ')}: open this kit in another folder"
                )
    renewed = reopened and _current_manifest(home) != kit.manifest
    _unpack(home, kit)
    lines = [f"study {kit.manifest.study}, site {kit.manifest.site}, server {kit.manifest.server}"]
    if not home.keys.exists():
        lines += _set_aside(home)
        _write_keys(home)
    if not home.config_file.exists():
        write_bytes(home.config_file, _template(home, kit).encode())
    return [
        *lines,
        f"wrote {home.path}" + (": a new kit, to be approved" if renewed else ": the same kit as before" * reopened),
        f"next: fill in {home.config_file}, and send the study the line that ld-client enroll --home {path} prints",
    ]


def _set_aside(home: SiteHome) -> list[str]:
    """Rename the audit log of a former key, as a log belongs to one key; returns a line to print if there was one."""
    if not home.audit_log.exists():
        return []
    until = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S")
    former = home.audit_log.with_name(f"audit-until-{until}.jsonl")
    home.audit_log.rename(former)
    if head_file(home.audit_log).exists():
        head_file(home.audit_log).rename(head_file(former))
    return [f"the log of the former key is kept as {former.name}; the new key starts a new log"]


def _current_manifest(home: SiteHome) -> KitManifest:
    """The manifest of the home's kit, whose other files may be incomplete."""
    try:
        content = json.loads((home.kit_folder / MANIFEST).read_bytes())
        return KitManifest(**content)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DeploymentError(f"'{home.kit_folder}' is damaged: remove it, and open the kit again") from error


def enrolment(home: SiteHome) -> str:
    """The site's name and public keys, as `ld-server admit` takes them."""
    return enrolment_line(home.kit().site, home.public_keys(), home.signing_key())


def _write_keys(home: SiteHome) -> None:
    """Make the site's keys in one step: a folder beside, renamed when it is complete."""
    fresh = home.path / "keys.new"
    shutil.rmtree(fresh, ignore_errors=True)
    for use, key in new_site_keys().items():
        write_private_key(fresh / f"{use}.key", key, openssh=use == "node")
    fresh.rename(home.keys)


def _unpack(home: SiteHome, kit: Kit) -> None:
    """Replace the home's kit: write a folder beside it, and rename it when it is complete."""
    fresh, old = home.path / "kit.new", home.path / "kit.old"
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    for name, content in {**kit.files, SIGNATURE: kit.signature.encode(), MANIFEST: kit.raw_manifest}.items():
        write_bytes(fresh / name, content)
    if home.kit_folder.exists():
        home.kit_folder.rename(old)
    fresh.rename(home.kit_folder)
    shutil.rmtree(old, ignore_errors=True)


def _template(home: SiteHome, kit: Kit) -> str:
    modality = load_config(Modality, home.kit_folder / MODALITY)
    attributes = ", ".join(f"{name}: {name}" for name in modality.attributes)
    return TEMPLATE.format(
        site=kit.manifest.site,
        base=kit.manifest.base_digest[:16],
        attributes=attributes,
    )
