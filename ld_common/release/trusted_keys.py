"""The studies' keys that this user trusts, remembered as ssh remembers hosts.

`$XDG_CONFIG_HOME/latent-drift/trusted_keys` (`~/.config` by default) has one line per key: OpenSSH's format, then the
one study whose releases the key may sign.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import CheckpointError, ConfigError, ReleaseError, SignatureError
from ld_common.core.strict_json import read_json, read_limited
from ld_common.protocol.keys import PublicKey, fingerprint, is_line, public_line, read_public_line
from ld_common.release.release import MANIFEST, SIGNATURE, Release, file_names, read_manifest, read_release
from ld_common.release.signature import check_manifest, read_signature


@dataclass(frozen=True)
class Trust:
    """A key that the user passed as trusted."""

    key: PublicKey
    study: str | None
    """The study of a kit.json, the only one that its key may sign for; None for a bare key."""


def read_trusted_release(folder: Path, trust: str = "", allow_unsigned: bool = False) -> tuple[Release, list[str]]:
    """Read a release that a trusted key signed; returns it with messages for the user.

    Args:
        trust: the signer's public key as `read_trust` takes it, which is then remembered for this study; the keys that
            were remembered before if empty.
        allow_unsigned: accept a release without a signature, such as a simulation's; an existing signature must hold,
            and a study with a remembered key signs its releases.

    Raises:
        SignatureError: unsigned, altered, or signed by a key that is not trusted.
        ReleaseError: no complete release.
    """
    if trust and allow_unsigned:
        raise ConfigError("--trust and --allow-unsigned exclude each other: is the release signed or not?")
    passed = read_trust(trust) if trust else None
    manifest, signature = read_manifest(folder), read_signature(folder)
    if signature is None:
        if not allow_unsigned:
            raise SignatureError(
                f"'{folder}' is not signed, so its origin cannot be verified: use --allow-unsigned for one of your own"
            )
        study = _study_name(manifest, folder)
        if remembered(study):
            raise SignatureError(
                f"the releases of '{study}' are signed, and this one is not: somebody removed its signature, or it is "
                f"of another study of that name. If it is yours, remove the study's line from {trusted_keys_file()}"
            )
        return read_release(folder), ["this release is not signed: its origin cannot be verified"]
    study, key = _study_name(manifest, folder), signature.key
    if passed is not None and passed.study not in (None, study):
        raise SignatureError(
            f"the release is of study '{study}', the kit that --trust names is of '{passed.study}': "
            f"give the kit.json of '{study}'"
        )
    given = None if passed is None else passed.key
    trusted = [given] if given is not None else remembered(study)
    if public_line(key) not in {public_line(candidate) for candidate in trusted}:
        raise SignatureError(_untrusted(study, key, given))
    check_manifest(manifest, signature, trusted)
    release = dataclasses.replace(read_release(folder), signed_by=fingerprint(key))
    listed = {*file_names(manifest), MANIFEST, SIGNATURE}
    present = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}
    if present - listed:
        raise ReleaseError(
            f"'{folder}' holds '{min(present - listed)}', which its signed manifest does not list: remove it, or copy "
            "the release again"
        )
    if release.manifest != manifest:
        raise ReleaseError(f"'{folder}' changed while it was read: try again")
    return release, [*([] if given is None else remember(study, given)), *note_number(study, key, manifest)]


def read_trust(text: str) -> Trust:
    """A public key from a line in OpenSSH's format, a file with such a line, or a kit.json.

    Raises:
        SignatureError: none of these.
    """
    if text.startswith(("ssh-", "ecdsa-")):
        return Trust(read_public_line(text), None)
    path = Path(text)
    try:
        content = read_limited(path).decode().strip()
    except (OSError, ValueError) as error:
        raise SignatureError(
            f"'{text[:100]}' is neither a public key (ssh-ed25519 ...) nor a file that holds one"
        ) from error
    if not content.startswith("{"):
        return Trust(read_public_line(content), None)
    try:
        kit = read_json(content)
        line, study = str(kit["public_key"]), kit["study"]
    except (ValueError, KeyError, RecursionError) as error:
        raise SignatureError(f"'{path}' has no public_key and study: give the kit.json of a site's kit") from error
    if not is_line(study):
        raise SignatureError(
            f"'{path}' has a study name that is not one printable line: give the kit.json of a site's kit"
        )
    return Trust(read_public_line(line), _one_spaced(study))


def trusted_keys_file() -> Path:
    """Path of the file of trusted keys."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    # the XDG specification ignores relative paths
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".config") / "latent-drift" / "trusted_keys"


def remembered(study: str) -> list[PublicKey]:
    """The remembered keys of a study; raises `SignatureError` if the file cannot be read."""
    return [key for key, name in _entries() if name == study]


def remember(study: str, key: PublicKey) -> list[str]:
    """Remember a key for a study; returns messages for the user, none if it was remembered already."""
    entries = _entries()
    if any(name == study and public_line(stored) == public_line(key) for stored, name in entries):
        return []
    path = trusted_keys_file()
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    text += "" if not text or text.endswith("\n") else "\n"
    try:
        write_bytes(path, (text + f"{public_line(key)} {study}\n").encode())
    except CheckpointError:  # a read-only home; the key was passed, so the release can be used
        return [f"{fingerprint(key)} cannot be remembered in {path}: pass --trust next time as well"]
    others = [fingerprint(stored) for stored, name in entries if name == study]
    return [
        f"from now on {fingerprint(key)} is trusted for releases of '{study}': remembered in {path}",
        *(
            f"note: '{study}' has another trusted key already, {other}: unless the study confirms both, remove the "
            "line of the wrong one"
            for other in others
        ),
    ]


def note_number(study: str, key: PublicKey, manifest: dict[str, object]) -> list[str]:
    """Remember the highest number of a study's releases; a message for a release that is older than it."""
    issued = manifest.get("release")
    number = issued.get("number") if isinstance(issued, dict) else None
    if not isinstance(number, int):
        return []
    path, name = trusted_keys_file().with_name("latest_releases.json"), f"{fingerprint(key)} {study}"
    try:
        seen = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        latest = int(seen.get(name, 0))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return [f"warning: cannot read '{path}', which holds each study's latest release: remove it if it is damaged"]
    if number < latest:
        return [f"warning: this is release {number} of '{study}'; release {latest} was used here before"]
    if number > latest:
        with contextlib.suppress(CheckpointError):  # a read-only home
            write_bytes(path, json.dumps(seen | {name: number}, indent=1).encode(), mode=0o600)
    return []


def _entries() -> list[tuple[PublicKey, str]]:
    path = trusted_keys_file()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise SignatureError(f"cannot read the trusted keys '{path}': {error}") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            words = line.split(maxsplit=2)
            if len(words) < 3:
                raise SignatureError(f"'{path}', line {number}: give key type, key and the study's name")
            entries.append((read_public_line(" ".join(words[:2])), words[2].strip()))
    return entries


def _study_name(manifest: dict[str, object], folder: Path) -> str:
    study = manifest.get("study")
    name = study.get("name") if isinstance(study, dict) else None
    if not is_line(name) or not _one_spaced(str(name)):
        raise ReleaseError(f"'{folder}' is not a complete release (no study's name): copy it again")
    return _one_spaced(str(name))


def _one_spaced(name: str) -> str:
    return " ".join(name.split())


def _untrusted(study: str, key: PublicKey, given: PublicKey | None) -> str:
    if given is not None:
        return f"the release is signed by {fingerprint(key)}, not by the key that --trust names, {fingerprint(given)}"
    return (
        f"the release of '{study}' is signed by {fingerprint(key)}, not trusted yet: if the study confirms the "
        f"fingerprint, add --trust '{public_line(key)}' once"
    )
