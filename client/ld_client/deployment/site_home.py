"""A hospital's folder of one study.

kit/             the study's kit, covered by its signature
keys/            the site's private keys (`ld_common.protocol.site_keys`), mode 0600; made here, never leave
site.crt         its certificate for the release service, fetched from the study's server
site.yaml        the site's config (SiteConfig), written by the data manager
approvals.json   approved code bundles and studies, and who approved them
approved/        copies of what was approved, for comparison with later kits
secure-aggregation/  secrets of a secure round between its stages, and which rounds were answered
audit.jsonl      log of what ran and what left, as a chain of hashes; audit.head is its signed head
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ld_client.site_config import SiteConfig, load_site
from ld_common.core.errors import DeploymentError
from ld_common.core.registry import Registry
from ld_common.protocol.enrollment_kit import FILES, MANIFEST, SIGNATURE, STEP_FILE, STUDY, KitManifest, check_manifest
from ld_common.protocol.foreign_packages import check_installed, site_packages
from ld_common.protocol.keys import read_elliptic_key, read_signing_key
from ld_common.protocol.site_keys import SiteKeys, public_keys

if TYPE_CHECKING:
    from ld_common.protocol.study_config import StudyConfig


@dataclass(frozen=True)
class SiteHome:
    """The folder that `ld-client init` made."""

    path: Path

    @property
    def kit_folder(self) -> Path:
        """The unpacked kit."""
        return self.path / "kit"

    @property
    def keys(self) -> Path:
        """Folder of the site's private keys."""
        return self.path / "keys"

    @property
    def node_key(self) -> Path:
        """The private key with which the site's node logs in."""
        return self.key_file("node")

    @property
    def certificate(self) -> Path:
        """The site's certificate."""
        return self.path / "site.crt"

    @property
    def config_file(self) -> Path:
        """The site's config."""
        return self.path / "site.yaml"

    @property
    def approvals(self) -> Path:
        """The list of approvals."""
        return self.path / "approvals.json"

    @property
    def audit_log(self) -> Path:
        """The audit log."""
        return self.path / "audit.jsonl"

    @property
    def code_folders(self) -> Path:
        """Parent of the folders `PID-SHA256` to which running tasks unpacked a code bundle."""
        return self.path / "flower" / "code"

    @property
    def secure_rounds(self) -> Path:
        """Folder of the state of secure aggregation, of which no stage may be answered twice."""
        return self.path / "secure-aggregation"

    @property
    def study_file(self) -> Path:
        """The kit's study."""
        return self.kit_folder / STUDY

    def kit(self) -> KitManifest:
        """The kit's manifest, checked against its signature and the files that lie there.

        Raises:
            DeploymentError: nobody ran `ld-client init` here, or a file of the kit was altered.
        """
        try:
            manifest = (self.kit_folder / MANIFEST).read_bytes()
            signature = (self.kit_folder / SIGNATURE).read_text()
            more = {path.name for path in self.kit_folder.iterdir() if STEP_FILE.fullmatch(path.name)} - {MANIFEST}
            files = {name: (self.kit_folder / name).read_bytes() for name in (*FILES, *sorted(more))}
        except (OSError, ValueError) as error:
            raise DeploymentError(f"'{self.path}' is no site's home: make it with ld-client init KIT --home") from error
        return check_manifest(manifest, signature, files)

    def key_file(self, use: str) -> Path:
        """File of the private key of one use: `node`, `certificate`, `signing` or `sealing`."""
        return self.keys / f"{use}.key"

    def key(self, use: str) -> EllipticCurvePrivateKey:
        """A key on an elliptic curve, `node`, `certificate` or `sealing`; raises `SignatureError`."""
        return read_elliptic_key(self.key_file(use))

    def signing_key(self) -> Ed25519PrivateKey:
        """The key of the site's signatures; raises `SignatureError`."""
        return read_signing_key(self.key_file("signing"))

    def public_keys(self) -> SiteKeys:
        """The site's public keys; raises `SignatureError` unless all four private ones are there."""
        elliptic = {use: self.key(use) for use in ("node", "certificate", "sealing")}
        return public_keys({**elliptic, "signing": self.signing_key()})

    def study(self) -> StudyConfig:
        """The kit's study. From then on this process may load entry points of its packages and of no others.

        Raises:
            ApprovalError: a package of the study is not installed here, or is not the one that the kit lists.
            ConfigError: the study cannot be read, or its adapter comes from a package that it does not list.
        """
        from ld_common.protocol.study_config import load_study

        records = self.kit().package_records
        check_installed(records)
        Registry.allow(site_packages(records))
        return load_study(self.study_file)[0]

    def site(self) -> SiteConfig:
        """The site's config; raises `DeploymentError` when it names another site than the kit."""
        site, kit = load_site(self.config_file), self.kit()
        if site.site != kit.site:
            raise DeploymentError(f"'{self.config_file}' is of site '{site.site}', but the kit is for '{kit.site}'")
        return site
