"""`ld-client pull`: fetch a release from the study's server, believe it only for its signature, and open it."""

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
    """Fetch a release, check who signed it, open it; returns lines to print.

    Args:
        home: the site's folder; its key opens what is encrypted to the site.
        name: a release's name; empty for the newest.
        out: folder to make; by default `HOME/releases/<name>`.
        progress: told the file's name, the bytes that are there, all bytes.

    Raises:
        DeploymentError: no usable certificate, the server cannot be reached or refuses.
        SignatureError: the release is not signed by the kit's key, or was altered.
        ReleaseError: no release, one of another study, encrypted to others, cut short, or altered.
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
        raise ReleaseError("the study has no release yet: try again when its people say that there is one")
    if not name:
        return max(releases, key=lambda one: one.number)
    for one in releases:
        if one.name == name:
            return one
    raise ReleaseError(
        f"the study has no release '{name}': there are {', '.join(sorted(one.name for one in releases))}"
    )


def _refuse_older(home: SiteHome, listed: Listed) -> None:
    """The newest release is never older than one that this site has: a server put back in time, or worse."""
    newest = 0
    for folder in (home.path / "releases").glob("*/"):
        if not folder.name.endswith(".part") and (folder / MANIFEST).exists():
            newest = max(newest, int(read_manifest(folder).get("release", {}).get("number", 0)))
    if listed.number < newest:
        raise ReleaseError(
            f"the server's newest release is {listed.number}, and this site has {newest} already: ask the study's "
            f"people, or name it with --release {listed.name}"
        )


def _fetch_manifest(client: ReleaseClient, kit: KitManifest, listed: Listed, target: Path) -> dict[str, Any] | None:
    """The release's manifest, when the kit's key signed it, in the partial folder; None when `target` is that release.

    What another release left in the partial folder is removed.
    """
    raw = client.manifest(listed.name)
    signature = b"".join(_limited(client.fetch(listed.name, SIGNATURE, 0), MAX_SIGNATURE_BYTES))
    if target.exists():
        held = target / MANIFEST
        if held.exists() and held.read_bytes() == raw:
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
            raise ReleaseError(f"the server offers another release as '{listed.name}': tell the study's people")
    except LdError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def _fetch_files(
    client: ReleaseClient, listed: Listed, manifest: dict[str, Any], partial: Path, site: str, progress: Progress
) -> None:
    """The manifest's files, or what they are sealed as, into the partial folder, on from what an earlier try left."""
    names, total, expected = file_names(manifest), sum(listed.files.values()), dict(manifest["files"])
    if ENVELOPE in listed.files:
        envelope = b"".join(_limited(client.fetch(listed.name, ENVELOPE, 0), MAX_MESSAGE_BYTES))
        check_recipient(read_envelope(envelope), site)
        if (partial / ENVELOPE).exists() and (partial / ENVELOPE).read_bytes() != envelope:
            for path in partial.rglob(f"*{SEALED_SUFFIX}"):  # begun under another key
                path.unlink()
        write_bytes(partial / ENVELOPE, envelope)
        secret = sealed_names(manifest)
        names = [name + SEALED_SUFFIX if name in secret else name for name in names]
        expected |= read_envelope(envelope).sha256
    if any(name not in listed.files for name in names):
        raise ReleaseError(f"the server's release '{listed.name}' lacks a file: tell the study's people")
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
            raise ReleaseError(f"'{name}' came altered, and was thrown away: pull again, and tell the study's people")


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
                        raise ReleaseError(f"the server sent more of '{name}' than it said: tell the study's people")
                    target.write(part)
                    progress(name, done, size)
            target.flush()
            os.fsync(target.fileno())
    except OSError as error:
        raise CheckpointError(f"cannot write '{path}' ({error.strerror or error}): free some space") from error
    if done < size:
        raise ReleaseError(
            f"'{name}' was cut short after {done:,} of {size:,} bytes: pull again, it goes on from there"
        )


def _finish(home: SiteHome, kit: KitManifest, manifest: dict[str, Any], target: Path) -> None:
    """Open what is encrypted, check all of it as it lies there, and only then give it its name."""
    partial = _partial(target)
    try:
        if (partial / ENVELOPE).exists():
            open_release(partial, manifest, kit.site, home.key())
        check_release(partial, [read_public_line(kit.public_key)])
    except LdError:
        shutil.rmtree(partial, ignore_errors=True)  # so that the next pull begins afresh
        raise
    partial.rename(target)


def _partial(target: Path) -> Path:
    """Where a release lies until it is whole."""
    return target.with_name(target.name + ".part")


def _limited(parts: Iterator[bytes], limit: int) -> Iterator[bytes]:
    total = 0
    for part in parts:
        total += len(part)
        if total > limit:
            raise ReleaseError("the server sent a message that is too large: tell the study's people")
        yield part


def _how_to_use(home: SiteHome, target: Path) -> list[str]:
    trust = f"--trust {home.kit_folder / KIT_MANIFEST}"
    return [f"draw with it: ld-generate edit {target} {trust} --input SCAN --target ATTRIBUTE=VALUE"]
