"""The signed manifest of a site kit: what a study is, who runs it, and the hashes of the kit's files.

A kit holds the study, its modality with the files that its `preprocessing` names, the certificate of its authority and
the code bundle, and nothing secret. Whoever
opens one for the first time compares the fingerprint of the study's key with what the study's team says by telephone.
`ld_common.protocol.kit_archive` reads and writes kits as files.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ld_common.core.errors import DeploymentError, LdError
from ld_common.core.strict_json import read_json
from ld_common.protocol.foreign_packages import PackageRecord, read_records
from ld_common.protocol.keys import MAX_LINE, Purpose, is_digest, is_line, public_line, read_public_line, verify
from ld_common.protocol.site_name import check_site_name

FORMAT = 2
MANIFEST, SIGNATURE = "kit.json", "kit.sig"
STUDY, MODALITY, AUTHORITY, BUNDLE = "study.yaml", "modality.yaml", "authority.crt", "bundle.fab"
FILES = (STUDY, MODALITY, AUTHORITY, BUNDLE)
"""Those of every kit."""
STEP_FILE = re.compile(r"[A-Za-z0-9][\w.-]{0,99}\.(json|bin|nii|nii\.gz)", re.ASCII)
"""Files that a step of the modality's `preprocessing` names."""
LINES = ("study", "site", "server", "release_service", "software")
DIGESTS = ("study_digest", "base_digest", "modality_digest")


@dataclass(frozen=True)
class KitManifest:
    """The content of `kit.json`, covered by the study's signature."""

    study: str
    """The study's name."""
    site: str
    """The site that this kit was made for."""
    server: str
    """`host:port` of the study's fleet proxy, to which nodes connect."""
    release_service: str
    """`host:port` of the service that releases are pulled from."""
    study_digest: str
    base_digest: str
    modality_digest: str
    public_key: str
    """The study's key, which signs kits and releases: one line of OpenSSH's format."""
    files: dict[str, str]
    """Name -> SHA-256, hex."""
    software: str
    """Version of this software at the server."""
    packages: list[dict[str, str]]
    """Fields of a `PackageRecord` for each package of others that the study uses."""
    site_keys: dict[str, str]
    """Admitted site -> public key of its signatures, one line of OpenSSH's format; secure aggregation needs all."""
    format: int = FORMAT

    @property
    def package_records(self) -> list[PackageRecord]:
        """`packages` as records."""
        return read_records(self.packages)

    @property
    def bundle_digest(self) -> str:
        """SHA-256 of the code bundle in hex, which is Flower's hash of it."""
        return self.files[BUNDLE]


def check_manifest(manifest: bytes, signature: str, files: dict[str, bytes]) -> KitManifest:
    """A manifest whose signature holds and whose hashes are those of `files`.

    Args:
        manifest: content of `kit.json`.
        signature: content of `kit.sig`.
        files: the kit's other files, by name.

    Raises:
        DeploymentError: the manifest cannot be read or trusted, or a file is not the one that it names.
    """
    try:
        content: dict[str, Any] = read_json(manifest)
        if content["format"] != FORMAT:
            raise DeploymentError(f"the kit is of another format than {FORMAT}, which this software reads: update it")
        kit = KitManifest(**content)
        check_fields(kit)
        verify(read_public_line(kit.public_key), Purpose.KIT, content, signature)
        check_site_name(kit.site)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DeploymentError(
            f"the kit's manifest cannot be read ({type(error).__name__}): ask for it again"
        ) from error
    except DeploymentError:
        raise
    except LdError as error:
        raise DeploymentError(f"the kit cannot be trusted: {error}") from error
    for name, digest in kit.files.items():
        if name not in files or hashlib.sha256(files[name]).hexdigest() != digest:
            raise DeploymentError(f"'{name}' is not the file that the kit's manifest names: ask for the kit again")
    return kit


def check_fields(kit: KitManifest) -> None:
    """Refuse fields that `write_kit` would not write: they are shown, and go into configs and command lines.

    Raises:
        DeploymentError: names the fields.
    """
    wrong = [name for name in LINES if not is_line(getattr(kit, name))]
    wrong += [name for name in DIGESTS if not is_digest(getattr(kit, name))]
    if not _are_files(kit.files):
        wrong.append("files")
    try:
        read_records(kit.packages)
    except (TypeError, ValueError):
        wrong.append("packages")
    if not _are_site_keys(kit.site_keys):
        wrong.append("site_keys")
    if wrong:
        raise DeploymentError(
            f"the kit's manifest is malformed ({', '.join(wrong)}): names and addresses are one line of 1 to "
            f"{MAX_LINE} printable characters, digests are SHA-256 in hex; ask the study for it again"
        )
    if not isinstance(kit.public_key, str) or public_line(read_public_line(kit.public_key)) != kit.public_key:
        raise DeploymentError("the kit's manifest names no public key as this software writes one: ask for it again")


def _are_files(files: object) -> bool:
    """Whether these are the hashes of `FILES`, and of files that steps may name and that are none of the kit's own."""
    if not isinstance(files, dict) or not set(FILES) <= set(files) or not all(map(is_digest, files.values())):
        return False
    return all(STEP_FILE.fullmatch(name) and name != MANIFEST for name in set(files) - set(FILES))


def _are_site_keys(keys: object) -> bool:
    """Whether these are the signing keys of sites, each another one."""
    if not isinstance(keys, dict) or len(set(map(str, keys.values()))) < len(keys):
        return False
    try:
        for site, line in keys.items():
            check_site_name(site)
            key = read_public_line(line)
            if not isinstance(key, Ed25519PublicKey) or public_line(key) != line:
                return False
    except (LdError, TypeError, AttributeError):
        return False
    return True
