"""The issued releases of a study: `HOME/releases/<study>-<number>/`, each written once and never changed."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ld_common.core.atomic_files import file_digest
from ld_common.core.errors import CheckpointError, DeploymentError, LdError, ReleaseError
from ld_common.protocol.keys import PublicKey, canonical, fingerprint, public_line
from ld_common.release.encryption import seal_release
from ld_common.release.release import (
    CARD,
    ENVELOPE,
    MANIFEST,
    SEALED_SUFFIX,
    SIGNATURE,
    file_names,
    read_manifest,
    read_release,
    write_manifest,
)
from ld_common.release.service_messages import MAX_MESSAGE_BYTES, Listed
from ld_common.release.signature import manifest_digest, release_name, sign_release
from ld_server.deployment.study_home import StudyHome

MAX_EVALUATION_BYTES = 200_000


def run_release(home: Path, to: list[str], evaluation: Path | None) -> list[str]:
    """Sign the release of a home's run and issue it; returns lines to print.

    Args:
        home: the study's home.
        to: admitted sites that can decrypt it; empty for an unencrypted release.
        evaluation: JSON file of results for the manifest.

    Raises:
        ReleaseError: `run` has no release, or one of another study, or an altered one.
        DeploymentError: a name in `to` is not an admitted site.
    """
    study_home = StudyHome(home).check()
    recipients = {site: _recipient(study_home, site) for site in to}
    key = study_home.study_key()
    manifest = _manifest(study_home, evaluation)
    manifest["release"] = {
        "number": max((issued.number for issued in list_releases(study_home)), default=0) + 1,
        "released": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    folder = releases_folder(study_home) / release_name(manifest)
    _issue(study_home.run / "release", folder, manifest, recipients, key)
    return [
        f"wrote {folder}, signed by {fingerprint(key.public_key())}",
        f"encrypted to {', '.join(recipients)}: only they can decrypt it"
        if recipients
        else "not encrypted: every admitted site can pull it with ld-client pull",
        f"to trust it, researchers use: ld-generate edit {folder.name} --trust '{public_line(key.public_key())}'",
    ]


def releases_folder(home: StudyHome) -> Path:
    """Folder of a home's releases."""
    return home.path / "releases"


def list_releases(home: StudyHome) -> list[Listed]:
    """The issued releases by number, without incomplete and damaged ones."""
    folder = releases_folder(home)
    paths = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
    listed = [entry for path in paths if (entry := _listed(path)) is not None]
    return sorted(listed, key=lambda entry: entry.number)


def _listed(folder: Path) -> Listed | None:
    try:
        manifest = read_manifest(folder)
        names = file_names(manifest)
        offered = [MANIFEST, SIGNATURE, ENVELOPE, *names, *(name + SEALED_SUFFIX for name in names)]
        sizes = {name: (folder / name).stat().st_size for name in offered if (folder / name).is_file()}
        complete = all(name in sizes or name + SEALED_SUFFIX in sizes for name in names)
        if release_name(manifest) != folder.name or SIGNATURE not in sizes or not complete:
            return None
        return Listed(folder.name, int(manifest["release"]["number"]), sizes)
    except (LdError, OSError, KeyError, TypeError):
        return None


def _manifest(home: StudyHome, evaluation: Path | None) -> dict[str, Any]:
    """The manifest of the home's run, with an evaluation; raises `ReleaseError`."""
    run, (study, _) = home.run / "release", home.study()
    release = read_release(run)
    if release.study.name != study.name:
        raise ReleaseError(f"'{run}' is of study '{release.study.name}', but this home is of '{study.name}'")
    manifest = release.manifest
    manifest["base_model"]["path"] = None  # an issued release leaves this machine
    if evaluation is not None:
        manifest["evaluation"] = _read_evaluation(evaluation)
    manifest_digest(manifest)  # refuses numbers that are not finite, before anything is written
    if len(json.dumps(manifest, indent=2).encode()) > MAX_MESSAGE_BYTES - 100_000:
        raise ReleaseError(f"the manifest of '{run}' is too large to be served: use a smaller drift.shape")
    return manifest


def _read_evaluation(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_EVALUATION_BYTES:
            raise ReleaseError(f"'{path}' is larger than {MAX_EVALUATION_BYTES} bytes: give a summary")
        content = json.loads(path.read_text(encoding="utf-8"))
        canonical(content)
    except OSError as error:
        raise ReleaseError(f"cannot read the evaluation '{path}': {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ReleaseError(f"the evaluation '{path}' is not JSON of finite numbers: {error}") from error
    if not isinstance(content, dict):
        raise ReleaseError(f"the evaluation '{path}' must be a JSON object")
    return content


def _recipient(home: StudyHome, name: str) -> PublicKey:
    site = home.sites().get(name)
    if site is None or site.revoked is not None:
        admitted = ", ".join(entry.name for entry in home.sites().values() if entry.revoked is None) or "none"
        raise DeploymentError(f"'{name}' is not an admitted site: {admitted}")
    return site.keys.sealing_key


def _issue(
    run: Path,
    folder: Path,
    manifest: dict[str, Any],
    recipients: dict[str, PublicKey],
    key: Ed25519PrivateKey,
) -> None:
    """Write a release folder atomically."""
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name in (name for name in file_names(manifest) if name != CARD):
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(run / name, partial / name)
            if file_digest(partial / name) != manifest["files"][name]:
                raise ReleaseError("the run has just written another release: try again when it has ended")
        write_manifest(partial, manifest)
        sign_release(partial, key)
        if recipients:
            seal_release(partial, manifest, recipients)
        partial.rename(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write '{folder}' ({error.strerror or error}): nothing was released") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
