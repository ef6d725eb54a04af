"""A hospital's home of a study, with a kit, a key and real data, and what its node would be asked."""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from flwr.app import Context, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from ld_client.data.indexing import build_store
from ld_client.data.store_key import KEY_FILE, write_key
from ld_client.deployment.approve import approve
from ld_client.deployment.join import join
from ld_client.deployment.site_home import SiteHome
from ld_client.site_config import SiteConfig, load_modality, load_site
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.config import to_mapping
from ld_common.diffusion.base_model import base_digest, load_denoiser
from ld_common.protocol.attestation import new_nonce
from ld_common.protocol.enrollment_kit import AUTHORITY, BUNDLE, MODALITY, STUDY, KitManifest
from ld_common.protocol.keys import PrivateKey, fingerprint, new_signing_key, write_private_key
from ld_common.protocol.kit_archive import write_kit
from ld_common.protocol.messages import TrainTask
from ld_common.protocol.site_keys import new_site_keys, public_keys
from ld_common.protocol.study_config import StudyConfig
from ld_server.deployment.bundle import build_bundle
from ld_server.deployment.certificates import make_authority, pem
from ld_server.deployment.study_packages import study_packages

_STORES: dict[str, Path] = {}
"""Stores that this process has indexed, by a digest of what they were made of."""


def index_site(site: SiteConfig) -> None:
    """`build_store`, or a copy of the store that it made of the same scans, table and base before."""
    options = {name: value for name, value in vars(site.data).items() if name not in ("root", "table")}
    digest = hashlib.sha256(f"{site.base_model} {site.modality} {site.batch_size} {options}".encode())
    for file in [Path(site.data.table), *sorted(Path(site.data.root).rglob("*"))]:
        digest.update(file.name.encode() + (file.read_bytes() if file.is_file() else b""))
    made = _STORES.get(digest.hexdigest())
    if made is None:
        if not (site.store_path / KEY_FILE).exists():
            write_key(site.store_path, b"5" * 32)  # a key of no secrecy, so that every run holds out the same patients
        build_store(site)
        made = Path(tempfile.mkdtemp(prefix="ld-test-store-"))
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        _STORES[digest.hexdigest()] = made
        shutil.copytree(site.store_path, made, dirs_exist_ok=True)
    else:
        shutil.copytree(made, site.store_path, dirs_exist_ok=True)


@cache
def site_keys(name: str) -> dict[str, PrivateKey]:
    """The private keys of a site, the same in all tests of this process."""
    return new_site_keys()


def make_home(
    folder: Path, site_yaml: Path, study: StudyConfig, server: str = "localhost:1", authority: bytes | None = None
) -> SiteHome:
    """Join a study as the site of `site_yaml`, whose scans are indexed; nothing is approved yet."""
    site = load_site(site_yaml)
    index_site(site)
    key, kit_file = new_signing_key(), folder / "aster.kit"
    files = {
        STUDY: yaml.safe_dump(to_mapping(dataclasses.replace(study, modality=MODALITY))).encode(),
        MODALITY: Path(site.modality).read_bytes(),
        AUTHORITY: authority or pem(make_authority(study.name)[1]),
        BUNDLE: build_bundle(),
    }
    digests = study.digest(), base_digest(site.base_model), load_modality(site).digest()
    manifest = KitManifest(
        study.name,
        site.site,
        server,
        server,
        *digests,
        public_key="",
        files={},
        software="this version",
        packages=[vars(record) for record in study_packages(study)] if study.packages else [],
        site_keys={name: public_keys(site_keys(name)).signing for name in study.federation.sites},
    )
    write_kit(kit_file, manifest, files, key)
    home = SiteHome(folder / "home")
    for use, private in site_keys(site.site).items():
        write_private_key(home.key_file(use), private)
    join(kit_file, home.path, fingerprint(key.public_key()))
    content = yaml.safe_load(site_yaml.read_text())
    content |= {"store": site.store, "modality": site.modality}
    content["data"] |= {"root": site.data.root, "table": site.data.table}
    home.config_file.write_text(yaml.safe_dump(content))
    return home


def approved(home: SiteHome) -> SiteHome:
    """The home, after its data manager approved the kit."""
    approve(home)
    return home


def task_of(home: SiteHome, **changes: Any) -> TrainTask:
    """The server's task of round 1."""
    study, kit, site = home.study(), home.kit(), home.site()
    state = inject(load_denoiser(site.base_model), read_adapter(study.adapter), study.seed).trainable_state()
    task = TrainTask(state, 1, json.dumps(to_mapping(study)), kit.base_digest, kit.modality_digest, nonce=new_nonce())
    return dataclasses.replace(task, **changes)


def node_of(home: SiteHome) -> Context:
    """The state of the home's node."""
    return Context(run_id=7, node_id=1, node_config={"home": str(home.path)}, state=RecordDict(), run_config={})


def asked(content: RecordDict, kind: str) -> Message:
    """A message as it reaches a node."""
    message = Message(content, dst_node_id=1, message_type=kind)
    message.metadata.__dict__["_message_id"] = str(uuid4())
    return message


def wire_bytes(reply: Message) -> bytes:
    """All bytes of a reply, as Flower sends them."""
    return b"".join(part.deflate() for part in get_all_nested_objects(reply).values())
