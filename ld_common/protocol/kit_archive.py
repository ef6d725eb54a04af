"""Site kits as files: one ZIP archive with the signed manifest and what it names."""

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

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ld_common.core.archives import archive_problem
from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import DeploymentError
from ld_common.protocol.enrollment_kit import MANIFEST, SIGNATURE, KitManifest, check_fields, check_manifest
from ld_common.protocol.keys import Purpose, public_line, sign

MAX_BYTES, MAX_FILES = 32_000_000, 32
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
"""What `zipfile` raises for archives that are damaged, by accident or on purpose."""


@dataclass(frozen=True)
class Kit:
    """A kit whose signature and hashes hold."""

    manifest: KitManifest
    raw_manifest: bytes
    """As the study wrote it."""
    signature: str
    files: dict[str, bytes]


def write_kit(path: Path, manifest: KitManifest, files: dict[str, bytes], key: Ed25519PrivateKey) -> None:
    """Sign and write a kit.

    Args:
        path: the file.
        manifest: hashes and public key are filled in.
        files: content of each of `FILES`, and of the files that the modality's `preprocessing` names.
        key: the study's.

    Raises:
        DeploymentError: a field of the manifest is malformed, such as a study's name of several lines.
    """
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    manifest = dataclasses.replace(manifest, files=digests, public_key=public_line(key.public_key()))
    check_fields(manifest)
    content = dataclasses.asdict(manifest)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MANIFEST, json.dumps(content, indent=2, sort_keys=True) + "\n")
        archive.writestr(SIGNATURE, sign(key, Purpose.KIT, content))
        for name, file in files.items():
            archive.writestr(name, file)
    write_bytes(path, buffer.getvalue())


def read_kit(path: Path) -> Kit:
    """Read a kit and check its signature and hashes.

    Raises:
        DeploymentError: the file is no kit, was altered, or is of another format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            problem = archive_problem(archive, MAX_BYTES, MAX_FILES)
            if problem is not None:
                raise DeploymentError(f"'{path}' {problem}: it is not a kit")
            manifest = archive.read(MANIFEST)
            signature = archive.read(SIGNATURE).decode()
            files = {name: archive.read(name) for name in archive.namelist() if name not in (MANIFEST, SIGNATURE)}
    except FileNotFoundError as error:
        raise DeploymentError(f"there is no file '{path}': give the kit that the study sent") from error
    except DAMAGE as error:
        raise DeploymentError(f"'{path}' is not a site kit ({error}): ask the study for it again") from error
    checked = check_manifest(manifest, signature, files)
    return Kit(checked, manifest, signature, {name: files[name] for name in checked.files})
