"""Make a study's home, admit sites and revoke them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import yaml
from cryptography.hazmat.primitives.asymmetric import ec

from ld_common.core.atomic_files import write_bytes
from ld_common.core.config import to_mapping
from ld_common.core.errors import DeploymentError
from ld_common.diffusion.base_model import base_digest
from ld_common.imaging.preparation.files import step_files
from ld_common.protocol.enrollment_kit import AUTHORITY, BUNDLE, MODALITY, STUDY, KitManifest
from ld_common.protocol.keys import (
    PrivateKey,
    fingerprint,
    new_signing_key,
    read_elliptic_key,
    write_private_key,
)
from ld_common.protocol.kit_archive import read_kit, write_kit
from ld_common.protocol.site_keys import read_enrolment
from ld_common.protocol.study_config import load_study
from ld_server.deployment import superlink
from ld_server.deployment.bundle import DISTRIBUTION, build_bundle
from ld_server.deployment.certificates import certify_server, certify_site, make_authority, pem
from ld_server.deployment.study_home import AdmittedSite, ServerConfig, StudyHome, address, now
from ld_server.deployment.study_packages import check_packages, study_packages, write_package_list
from ld_server.study_start import read_start

LOCAL = ("localhost", superlink.LOOPBACK)


def provision(study_file: Path, path: Path, server: ServerConfig, overrides: Sequence[str] = ()) -> StudyHome:
    """Make the home of a study: keys, certificates, code bundle, one kit a site.

    Raises:
        DeploymentError: the folder is a study's home already, or the study uses a package that it does not list.
        LdError: the study, its modality or its base cannot be read.
    """
    home = StudyHome(path.resolve())
    if home.registry.exists():
        raise DeploymentError(f"'{path}' is a study's home already: make its kits again with ld-server update")
    study, modality = load_study(study_file, list(overrides))
    study_packages(study)
    study, _ = read_start(study)
    digest = base_digest(study.base_model)
    base = Path(study.base_model)
    placed = dataclasses.replace(
        study,
        base_model=str(base.resolve()) if base.exists() else study.base_model,
        start=str(Path(study.start).resolve()) if study.start else "",
        modality=MODALITY,
        output="run",
    )
    authority_key, authority = make_authority(study.name)
    server_key = ec.generate_private_key(ec.SECP384R1())
    certificate = certify_server(authority_key, authority, server_key.public_key(), [*server.hosts, *LOCAL])
    keys: dict[str, PrivateKey] = {"authority": authority_key, "server": server_key, "study": new_signing_key()}
    _write_yaml(home.path / "study.yaml", to_mapping(placed))
    _write_yaml(home.path / "modality.yaml", modality.shared())
    for name, content in step_files(modality.preprocessing).items():
        write_bytes(home.path / name, content)
    _write_yaml(home.path / "server.yaml", to_mapping(server))
    for name, key in keys.items():
        write_private_key(home.keys / f"{name}.key", key)
    write_bytes(home.certificate("authority"), pem(authority))
    write_bytes(home.certificate("server"), pem(certificate))
    _write_kits(home, digest, {})
    home.write_sites({})  # last: a folder with it is whole
    return home


def update(home: StudyHome) -> None:
    """Make code bundle, kits and the server's certificate again.

    Needed after a change of `study.yaml`, of `hosts` in `server.yaml` or of the software, or when the certificate
    expires.
    """
    study, _ = load_study(home.check().path / "study.yaml")
    placed, _ = read_start(dataclasses.replace(study, start_digest=""))
    if placed != study:
        _write_yaml(home.path / "study.yaml", to_mapping(placed))
    key = read_elliptic_key(home.keys / "server.key")
    certificate = certify_server(*home.authority(), key.public_key(), [*home.server().hosts, *LOCAL])
    write_bytes(home.certificate("server"), pem(certificate))
    _write_kits(home, base_digest(study.base_model), admitted_keys(home))


def check_bundle(home: StudyHome) -> None:
    """Raise `DeploymentError` when the installed software or packages are not what the sites approved."""
    if home.bundle.read_bytes() != build_bundle():
        raise DeploymentError(
            f"the installed software is not the code in '{home.bundle}', which the sites approved: run ld-server "
            "update and send the new kits, or install the former version"
        )
    study = home.study()[0]
    check_packages(home.path, study)
    if study.federation.secure_aggregation:
        _check_kits(home, study.federation.sites)


def _check_kits(home: StudyHome, sites: Sequence[str]) -> None:
    """Refuse a secure study whose kits lack a site's key: the others would refuse every round."""
    keys = admitted_keys(home)
    for site in sites:
        kit = home.kits / f"{site}.kit"
        sent = read_kit(kit).manifest.site_keys if kit.exists() else {}
        for name, line in keys.items():
            if sent.get(name) != line:
                raise DeploymentError(
                    f"the kit of '{site}' lacks the present key of '{name}', and a secure sum needs it: run ld-server "
                    "update and send each site its new kit"
                )


def admit(home: StudyHome, name: str, line: str, replace: bool = False) -> AdmittedSite:
    """Admit a site with the public keys that `ld-client enroll` printed, and issue its certificate.

    Args:
        home: the study's.
        name: the site.
        line: the printed line.
        replace: revoke the keys that the site was admitted with before, for good.

    Raises:
        DeploymentError: the site is not in the study, or a key is another site's, revoked, or a second one without
            `replace`.
        SignatureError: the line was cut or altered.
    """
    study, _ = home.check().study()
    if name not in study.federation.sites:
        raise DeploymentError(
            f"'{name}' is not a site of the study, whose sites are {', '.join(study.federation.sites)}"
        )
    owner, keys = read_enrolment(line)
    if owner != name:
        raise DeploymentError(f"this line was printed by site '{owner}', not by '{name}'")
    certificate = certify_site(*home.authority(), keys.certificate_key, name)
    with home.editing() as sites, superlink.control(home) as client:
        held = set(dataclasses.asdict(keys).values())
        for other in sites.values():
            if other.name != name and held & set(dataclasses.asdict(other.keys).values()):
                raise DeploymentError(f"these are keys of site '{other.name}'")
        before = sites.get(name)
        if before is not None and before.keys.node == keys.node and before.revoked is not None:
            raise DeploymentError(superlink.REVOKED_KEY)
        superlink.check_not_revoked(client, keys.node_key)
        if before is not None and not replace and before.revoked is None and before.keys != keys:
            raise DeploymentError(
                f"'{name}' was admitted with other keys, {before.keys.fingerprint}: if the site made new ones, "
                "--replace admits them and revokes the former for good"
            )
        write_bytes(home.site_certificate(name), pem(certificate))
        sites[name] = AdmittedSite(name, keys, now())
        home.write_sites(sites)  # before Flower is told, which must never accept a key that is not on the list
        superlink.register_node(client, keys.node_key)
        if before is not None and before.keys.node != keys.node:
            superlink.unregister_node(client, before.keys.node_key)
        return sites[name]


def revoke(home: StudyHome, name: str) -> None:
    """Revoke a site at once: its node, its certificate, its results; raises `DeploymentError`."""
    with home.check().editing() as sites:
        site = sites.get(name)
        if site is None:
            raise DeploymentError(f"site '{name}' was never admitted")
        sites[name] = dataclasses.replace(site, revoked=site.revoked or now())
        home.write_sites(sites)  # before Flower is told, which may be down
        with superlink.control(home) as client:
            superlink.unregister_node(client, site.keys.node_key)


def synchronize(home: StudyHome) -> None:
    """Set the SuperLink's list of keys to the admitted sites'."""
    with home.editing() as sites, superlink.control(home) as client:
        admitted = {superlink.pem(site.keys.node_key): site for site in sites.values() if site.revoked is None}
        listed = {node.public_key: node for node in superlink.nodes(client)}
        for key, node in listed.items():
            if node.registered and key not in admitted:
                superlink.unregister(client, node)
        for key, site in admitted.items():
            if key not in listed:
                superlink.register_new(client, site.keys.node_key)
            elif not listed[key].registered:  # after the home was restored; the other sites continue
                print(f"Flower refuses site '{site.name}': {superlink.REVOKED_KEY}", flush=True)


def study_fingerprint(home: StudyHome) -> str:
    """The fingerprint that sites compare before they trust a kit."""
    return fingerprint(home.study_key().public_key())


def admitted_keys(home: StudyHome) -> dict[str, str]:
    """The signing keys of the admitted sites that were not revoked, by site."""
    return {name: site.keys.signing for name, site in home.sites().items() if site.revoked is None}


def _write_kits(home: StudyHome, digest: str, site_keys: dict[str, str]) -> None:
    study, modality = load_study(home.path / "study.yaml")
    server, key, packages = home.server(), home.study_key(), study_packages(study)
    write_bytes(home.bundle, build_bundle())
    write_package_list(home.path, packages)
    # sites need not know the server's folders
    shared = dataclasses.replace(study, base_model=Path(study.base_model).name, start="", output="run")
    files = {
        STUDY: _yaml(to_mapping(shared)),
        MODALITY: (home.path / "modality.yaml").read_bytes(),
        AUTHORITY: home.certificate("authority").read_bytes(),
        BUNDLE: home.bundle.read_bytes(),
        **step_files(modality.preprocessing),
    }
    shutil.rmtree(home.kits, ignore_errors=True)
    for site in study.federation.sites:
        manifest = KitManifest(
            study=study.name,
            site=site,
            server=address(server.hosts[0], server.gate_port),
            release_service=address(server.hosts[0], server.release_port),
            study_digest=study.digest(),
            base_digest=digest,
            modality_digest=modality.digest(),
            public_key="",
            files={},
            software=f"{DISTRIBUTION} {version(DISTRIBUTION)}",
            packages=[vars(record) for record in packages],
            site_keys=site_keys,
        )
        write_kit(home.kits / f"{site}.kit", manifest, files, key)


def _yaml(content: object) -> bytes:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()


def _write_yaml(path: Path, content: object) -> None:
    write_bytes(path, _yaml(content))
