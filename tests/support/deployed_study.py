"""A study's home with real keys and certificates, and sites' homes that hold its kit, all small and on this machine."""

from __future__ import annotations

import dataclasses
import json
import socket
import zipfile
from pathlib import Path
from typing import Any

import grpc
import torch
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ld_client.deployment.site_home import SiteHome
from ld_common.core.config import from_mapping
from ld_common.diffusion.drift import LatentDrift
from ld_common.imaging.modality import Modality
from ld_common.protocol.enrollment_kit import AUTHORITY, BUNDLE, MODALITY, STUDY, KitManifest
from ld_common.protocol.keys import new_signing_key, write_private_key
from ld_common.protocol.kit_archive import write_kit
from ld_common.protocol.site_keys import new_site_keys, public_keys
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import ReleaseContent, write_release
from ld_server.deployment.certificates import certify_server, certify_site, make_authority, pem
from ld_server.deployment.study_home import AdmittedSite, StudyHome, now

NUMBERS = 300_000
"""Of the adapter: several chunks on the wire, two segments of its encryption."""
ROUND = {"round": 1, "left_out": {}, "sites": {"aster": {"visits": 9, "patients": 4}}}


class DeployedStudy:
    """A home in `folder/home`, sites that may be admitted in `folder/<site>`."""

    def __init__(self, folder: Path, name: str, modality: Path) -> None:
        self.folder, self.name, self.modality = folder, name, modality
        self.home = StudyHome(folder / "home")
        self.address = f"localhost:{free_port()}"
        self.study_key = new_signing_key()
        self.authority_key, self.authority = make_authority(name)
        server_key = ec.generate_private_key(ec.SECP384R1())
        for key_name, key in (("study", self.study_key), ("authority", self.authority_key), ("server", server_key)):
            write_private_key(self.home.keys / f"{key_name}.key", key)
        self.home.certificates.mkdir()
        server = certify_server(self.authority_key, self.authority, server_key.public_key(), ["localhost", "127.0.0.1"])
        self.home.certificate("authority").write_bytes(pem(self.authority))
        self.home.certificate("server").write_bytes(pem(server))
        self.home.write_sites({})
        content = {"name": name, "modality": "modality.yaml", "federation": {"sites": ["aster", "birch"]}}
        (self.home.path / "study.yaml").write_text(yaml.safe_dump(content))
        (self.home.path / "modality.yaml").write_bytes(modality.read_bytes())

    def train(self) -> Path:
        """Write a run's release, as a finished study does; random numbers."""
        study, modality = self.home.study()
        state, drift = {"unet.layer.weight": torch.randn(NUMBERS)}, LatentDrift(torch.full((4, 1, 1), 0.5))
        content = ReleaseContent("0" * 64, state, drift, {"aster": drift}, [ROUND])
        return write_release(self.home.run / "release", study, modality, content)

    def admit(self, site: str) -> SiteHome:
        """A site with kit, key and certificate, that the study lists."""
        home, keys = SiteHome(self.folder / site), new_site_keys()
        kit_file = self.folder / f"{site}.kit"
        files = {
            STUDY: (self.home.path / "study.yaml").read_bytes(),
            MODALITY: self.modality.read_bytes(),
            AUTHORITY: pem(self.authority),
            BUNDLE: b"code",
        }
        manifest = KitManifest(self.name, site, self.address, self.address, *["0" * 64] * 3, "", {}, "0", [], {})
        write_kit(kit_file, manifest, files, self.study_key)
        with zipfile.ZipFile(kit_file) as archive:
            archive.extractall(home.kit_folder)
        for use, key in keys.items():
            write_private_key(home.key_file(use), key)
        home.certificate.write_bytes(self.certificate(site, home.key("certificate")))
        with self.home.editing() as sites:
            sites[site] = AdmittedSite(site, public_keys(keys), now())
        return home

    def certificate(self, site: str, key: ec.EllipticCurvePrivateKey, days: float = 1) -> bytes:
        """A certificate of this study's authority, PEM."""
        return pem(certify_site(self.authority_key, self.authority, key.public_key(), site, days))

    def revoke(self, site: str) -> None:
        """Shut a site out."""
        with self.home.editing() as sites:
            sites[site] = dataclasses.replace(sites[site], revoked=now())

    def channel(self, key: ec.EllipticCurvePrivateKey | None = None, certificate: bytes | None = None) -> Any:
        """A bare gRPC channel to the study's address, with any certificate or none."""
        private = None
        if key is not None:
            private = key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        credentials = grpc.ssl_channel_credentials(pem(self.authority), private, certificate)
        return grpc.secure_channel(self.address, credentials)

    def channel_of(self, site: SiteHome) -> Any:
        """A bare gRPC channel with a site's own key and certificate."""
        return self.channel(site.key("certificate"), site.certificate.read_bytes())

    def rewrite(self, release: str, **changes: Any) -> dict[str, Any]:
        """Change an issued manifest without signing it again; returns its new content."""
        path = self.home.path / "releases" / release / "manifest.json"
        manifest = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(manifest))
        return manifest


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def study_config(name: str) -> StudyConfig:
    """A study, as simulations have it."""
    return from_mapping(StudyConfig, {"name": name, "federation": {"sites": ["aster", "birch"]}})


def small_release(folder: Path, modality: Modality, name: str = "demo") -> Path:
    """An unsigned release folder that no base model belongs to."""
    return write_release(
        folder, study_config(name), modality, ReleaseContent("0" * 64, {"a": torch.randn(9)}, rounds=[ROUND])
    )
