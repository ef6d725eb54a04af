"""A site kit: all that a hospital needs to join a study, and nothing that is secret.

One ZIP file: the study, its modality, the authority that vouches for the server, the code bundle that the study runs,
and a manifest with their hashes, signed by the study's key. Who opens it first compares that key's fingerprint with
what the study's people say on another channel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import DeploymentError, LdError
from ld_common.protocol.keys import MAX_LINE, Purpose, is_digest, is_line, public_line, read_public_line, sign, verify
from ld_common.protocol.site_name import check_site_name

FORMAT = 1
MANIFEST, SIGNATURE = "kit.json", "kit.sig"
STUDY, MODALITY, AUTHORITY, BUNDLE = "study.yaml", "modality.yaml", "authority.crt", "bundle.fab"
FILES = (STUDY, MODALITY, AUTHORITY, BUNDLE)
LINES = ("study", "site", "server", "release_service", "software")
DIGESTS = ("study_digest", "base_digest", "modality_digest")
MAX_BYTES = 32_000_000
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Of others, `zipfile` unpacks more than an entry says that it holds."""
DAMAGE = (
    OSError,
    EOFError,
    LookupError,
    ValueError,
    OverflowError,
    RuntimeError,  # an encrypted entry
    NotImplementedError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)
"""What `zipfile` raises for archives that are damaged or made to be so."""


@dataclass(frozen=True)
class KitManifest:
    """What a kit says of itself; signed."""

    study: str
    """The study's name."""
    site: str
    """The site that it was made for."""
    server: str
    """`host:port` of the study's gate, where nodes come in."""
    release_service: str
    """`host:port` where releases are fetched."""
    study_digest: str
    base_digest: str
    modality_digest: str
    public_key: str
    """The study's key, that signs kits and releases: one line of OpenSSH's format."""
    files: dict[str, str]
    """Name -> SHA-256, hex."""
    software: str
    """Version of this software at the server."""
    format: int = FORMAT

    @property
    def bundle_digest(self) -> str:
        """SHA-256 of the code bundle, hex: what Flower calls its hash."""
        return self.files[BUNDLE]


@dataclass(frozen=True)
class Kit:
    """A kit whose signature and hashes hold."""

    manifest: KitManifest
    raw_manifest: bytes
    """As it was written."""
    signature: str
    files: dict[str, bytes]


def write_kit(path: Path, manifest: KitManifest, files: dict[str, bytes], key: Ed25519PrivateKey) -> None:
    """Sign and write a kit; `files` holds those of `FILES`, whose hashes are put into the manifest.

    Raises:
        DeploymentError: the manifest says what no reader takes, such as a study's name of several lines.
    """
    digests = {name: hashlib.sha256(files[name]).hexdigest() for name in FILES}
    manifest = dataclasses.replace(manifest, files=digests, public_key=public_line(key.public_key()))
    _check_fields(manifest)
    content = dataclasses.asdict(manifest)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MANIFEST, json.dumps(content, indent=2, sort_keys=True) + "\n")
        archive.writestr(SIGNATURE, sign(key, Purpose.KIT, content))
        for name in FILES:
            archive.writestr(name, files[name])
    write_bytes(path, buffer.getvalue())


def read_kit(path: Path) -> Kit:
    """Read a kit and check its signature and hashes.

    Raises:
        DeploymentError: no kit, one that was altered, or of another format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
                raise DeploymentError(f"'{path}' unpacks to more than {MAX_BYTES} bytes: this is no kit")
            if any(entry.compress_type not in COMPRESSIONS for entry in archive.infolist()):
                raise DeploymentError(f"'{path}' is compressed in a way that no kit is: ask the study for it again")
            manifest = archive.read(MANIFEST)
            signature = archive.read(SIGNATURE).decode()
            files = {name: archive.read(name) for name in FILES}
    except FileNotFoundError as error:
        raise DeploymentError(f"there is no file '{path}': give the kit that the study sent") from error
    except DAMAGE as error:
        raise DeploymentError(f"'{path}' is no site kit ({error}): ask the study for it again") from error
    return Kit(check_manifest(manifest, signature, files), manifest, signature, files)


def check_manifest(manifest: bytes, signature: str, files: dict[str, bytes]) -> KitManifest:
    """The manifest of files that it names rightly; raises `DeploymentError`."""
    try:
        content: dict[str, Any] = json.loads(manifest)
        if content["format"] != FORMAT:
            raise DeploymentError(f"the kit is of another format than {FORMAT}, which this software reads: update it")
        kit = KitManifest(**content)
        _check_fields(kit)
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
    for name in FILES:
        if hashlib.sha256(files[name]).hexdigest() != kit.files.get(name):
            raise DeploymentError(f"'{name}' is not the file that the kit's manifest names: ask for the kit again")
    return kit


def _check_fields(kit: KitManifest) -> None:
    """Refuse what is not as `write_kit` writes it: parts of it are shown, and go into configs and command lines."""
    wrong = [name for name in LINES if not is_line(getattr(kit, name))]
    wrong += [name for name in DIGESTS if not is_digest(getattr(kit, name))]
    if not isinstance(kit.files, dict) or set(kit.files) != set(FILES) or not all(map(is_digest, kit.files.values())):
        wrong.append("files")
    if wrong:
        raise DeploymentError(
            f"the kit's manifest is not in order ({', '.join(wrong)}): names and addresses are one line of 1 to "
            f"{MAX_LINE} printable characters, digests are SHA-256 in hex; ask the study for it again"
        )
    if not isinstance(kit.public_key, str) or public_line(read_public_line(kit.public_key)) != kit.public_key:
        raise DeploymentError("the kit's manifest names no public key as this software writes one: ask for it again")
