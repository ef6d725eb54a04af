"""`ld-client pull`: fetches a release from the study's server, checks its signature and decrypts it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ld_client.deployment.release_client import ReleaseClient
from ld_client.deployment.site_certificate import fetch_certificate
from ld_client.deployment.site_home import SiteHome
from ld_common.core.atomic_files import file_digest, write_bytes
from ld_common.core.errors import CheckpointError, LdError, ReleaseError
from ld_common.protocol.enrollment_kit import MANIFEST as KIT_MANIFEST
from ld_common.protocol.enrollment_kit import KitManifest
from ld_common.protocol.keys import fingerprint, read_public_line
from ld_common.release.encryption import check_recipient, open_release, read_envelope, sealed_names
from ld_common.release.release import ENVELOPE, MANIFEST, SEALED_SUFFIX, SIGNATURE, file_names, read_manifest
from ld_common.release.service_messages import (
    MAX_MESSAGE_BYTES,
    Listed,
)
from ld_common.release.signature import (
    MAX_SIGNATURE_BYTES,
    check_manifest,
    check_release,
    parse_signature,
    release_name,
)

Progress = Callable[[str, int, int], None]


def pull(
    home: SiteHome, name: str, out: Path | None, progress: Progress = lambda stage, done, total: None
) -> list[str]:
    """Fetch a release, check its signature and decrypt it; returns lines to print.

    Args:
        home: the site's folder; its key decrypts releases that are encrypted to the site.
        name: a release's name; empty for the newest.
        out: folder to make; by default `HOME/releases/<name>`.
        progress: called with a file's name, the bytes received and all bytes.

    Raises:
        DeploymentError: the site has no valid certificate, or the server cannot be reached or refuses the site.
        SignatureError: the kit's key did not sign the release, or it was altered.
        ReleaseError: there is no such release, it is of another study, encrypted to other sites, incomplete or altered.
    """
    kit = home.kit()
    if not home.certificate.exists():
        fetch_certificate(home)
    with ReleaseClient(home, kit).connected() as client:
        listed = _choose(client.list(), name)
        if not name:
            _refuse_older(home, listed)
        target = home.path / "releases" / listed.name if out is None else out.resolve()
        try:
            manifest = _fetch_manifest(client, kit, listed, target)
            if manifest is None:
                return [f"{target} is this release already", *_how_to_use(home, target)]
            _fetch_files(client, listed, manifest, _partial(target), kit.site, progress)
            _finish(home, kit, manifest, target)
        except OSError as error:
            raise CheckpointError(
                f"cannot write '{target}' ({error.strerror or error}): choose another --out"
            ) from error
    number, rounds = manifest["release"]["number"], len(manifest["rounds"])
    signer = fingerprint(read_public_line(kit.public_key))
    return [
        f"wrote {target}: release {number} of '{kit.study}', {rounds} round{'s'[: rounds != 1]}, signed by {signer}",
        *_how_to_use(home, target),
    ]


def _choose(releases: list[Listed], name: str) -> Listed:
    if not releases:
        raise ReleaseError("the study has no release yet: try again later")
    if not name:
        return max(releases, key=lambda release: release.number)
    for release in releases:
        if release.name == name:
            return release
    known = ", ".join(sorted(release.name for release in releases))
    raise ReleaseError(f"the study has no release '{name}': there are {known}")


def _refuse_older(home: SiteHome, listed: Listed) -> None:
    """Refuse a newest release that is older than one at this site: the server was reset, or is not the study's."""
    newest = 0
    for folder in (home.path / "releases").glob("*/"):
        if not folder.name.endswith(".part") and (folder / MANIFEST).exists():
            newest = max(newest, int(read_manifest(folder).get("release", {}).get("number", 0)))
    if listed.number < newest:
        raise ReleaseError(
            f"the server's newest release is {listed.number}, but this site has {newest} already: ask the study, or "
            f"name it with --release {listed.name}"
        )


def _fetch_manifest(client: ReleaseClient, kit: KitManifest, listed: Listed, target: Path) -> dict[str, Any] | None:
    """Write a release's manifest into the partial folder; returns None when `target` is that release already.

    Files of another release in the partial folder are removed.

    Raises:
        SignatureError: the kit's key did not sign it.
        ReleaseError: it is another release, or `target` exists and is another one.
    """
    raw = client.manifest(listed.name)
    signature = b"".join(_limited(client.fetch(listed.name, SIGNATURE, 0), MAX_SIGNATURE_BYTES))
    if target.exists():
        present = target / MANIFEST
        if present.exists() and present.read_bytes() == raw:
            check_release(target, [read_public_line(kit.public_key)])
            return None
        raise ReleaseError(f"'{target}' exists and is not this release: choose another --out")
    partial = _partial(target)
    if (partial / MANIFEST).exists() and (partial / MANIFEST).read_bytes() != raw:
        shutil.rmtree(partial)
    write_bytes(partial / MANIFEST, raw)
    write_bytes(partial / SIGNATURE, signature)
    try:
        manifest = read_manifest(partial)
        check_manifest(manifest, parse_signature(signature), [read_public_line(kit.public_key)])
        name, study = release_name(manifest), manifest["study"]["name"]
        if study != kit.study:
            raise ReleaseError(f"the server offers a release of the study '{study}', this kit is of '{kit.study}'")
        file_names(manifest)
        if name != listed.name:
            raise ReleaseError(f"the server offers another release as '{listed.name}': tell the study")
    except LdError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def _fetch_files(
    client: ReleaseClient, listed: Listed, manifest: dict[str, Any], partial: Path, site: str, progress: Progress
) -> None:
    """Fetch the manifest's files, or their encrypted forms, and continue files that are there in part."""
    names, total, expected = file_names(manifest), sum(listed.files.values()), dict(manifest["files"])
    if ENVELOPE in listed.files:
        envelope = b"".join(_limited(client.fetch(listed.name, ENVELOPE, 0), MAX_MESSAGE_BYTES))
        check_recipient(read_envelope(envelope), site)
        if (partial / ENVELOPE).exists() and (partial / ENVELOPE).read_bytes() != envelope:
            for path in partial.rglob(f"*{SEALED_SUFFIX}"):  # they were encrypted with another key
                path.unlink()
        write_bytes(partial / ENVELOPE, envelope)
        secret = sealed_names(manifest)
        names = [name + SEALED_SUFFIX if name in secret else name for name in names]
        expected |= read_envelope(envelope).sha256
    if any(name not in listed.files for name in names):
        raise ReleaseError(f"the server's release '{listed.name}' lacks a file: tell the study")
    free = shutil.disk_usage(partial).free
    if free < 2 * total:
        raise CheckpointError(
            f"the release needs {2 * total:,} bytes, '{partial.parent}' has {free:,}: free some space"
        )
    for name in names:
        _fetch_file(client, listed, name, partial / name, progress)
    for name in names:
        if file_digest(partial / name) != expected.get(name):
            (partial / name).unlink()
            raise ReleaseError(
                f"'{name}' does not have its signed hash and was deleted: pull again, and tell the study"
            )


def _fetch_file(client: ReleaseClient, listed: Listed, name: str, path: Path, progress: Progress) -> None:
    path.parent.mkdir(exist_ok=True)
    size, done = listed.files[name], path.stat().st_size if path.exists() else 0
    if done > size:
        path.unlink()
        done = 0
    try:
        with path.open("ab") as target:
            if done < size:
                for part in client.fetch(listed.name, name, done):
                    done += len(part)
                    if done > size:
                        raise ReleaseError(f"the server sent more of '{name}' than it announced: tell the study")
                    target.write(part)
                    progress(name, done, size)
            target.flush()
            os.fsync(target.fileno())
    except OSError as error:
        raise CheckpointError(f"cannot write '{path}' ({error.strerror or error}): free some space") from error
    if done < size:
        raise ReleaseError(f"'{name}' ended after {done:,} of {size:,} bytes: pull again to continue")


def _finish(home: SiteHome, kit: KitManifest, manifest: dict[str, Any], target: Path) -> None:
    """Decrypt the release, check all of its files, and only then rename it to `target`."""
    partial = _partial(target)
    try:
        if (partial / ENVELOPE).exists():
            open_release(partial, manifest, kit.site, home.key("sealing"))
        check_release(partial, [read_public_line(kit.public_key)])
    except LdError:
        shutil.rmtree(partial, ignore_errors=True)  # so that the next pull starts again
        raise
    partial.rename(target)


def _partial(target: Path) -> Path:
    """Folder of a release until it is complete."""
    return target.with_name(target.name + ".part")


def _limited(parts: Iterator[bytes], limit: int) -> Iterator[bytes]:
    total = 0
    for part in parts:
        total += len(part)
        if total > limit:
            raise ReleaseError("the server sent a message that is too large: tell the study")
        yield part


def _how_to_use(home: SiteHome, target: Path) -> list[str]:
    trust = f"--trust {home.kit_folder / KIT_MANIFEST}"
    return [f"use it: ld-generate edit {target} {trust} --input SCAN --target ATTRIBUTE=VALUE"]
