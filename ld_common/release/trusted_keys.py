"""Whose releases this user believes: the keys of studies, remembered as ssh remembers hosts.

`$XDG_CONFIG_HOME/latent-drift/trusted_keys` (`~/.config` by default) has a line a key, OpenSSH's format, and after it
the one study whose releases it may sign: a study's key says nothing about another study.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import CheckpointError, ConfigError, ReleaseError, SignatureError
from ld_common.protocol.keys import PublicKey, fingerprint, is_line, public_line, read_public_line
from ld_common.release.release import Release, read_manifest, read_release
from ld_common.release.signature import check_manifest, read_signature


@dataclass(frozen=True)
class Trust:
    """What a user gave as trusted."""

    key: PublicKey
    study: str | None
    """The one study that a kit.json names beside its key; None for a bare key."""


def read_trusted_release(folder: Path, trust: str = "", allow_unsigned: bool = False) -> tuple[Release, list[str]]:
    """Read a release that a trusted key signed; returns it with lines to tell the user.

    Args:
        trust: the signer's public key as `read_trust` takes it; it is then remembered for this study. Without it, the
            keys count that were remembered before.
        allow_unsigned: take a release that nobody signed, such as a simulation's. One that was signed must hold still.

    Raises:
        SignatureError: unsigned, altered, or signed by a key that is not trusted.
        ReleaseError: no whole release.
    """
    if trust and allow_unsigned:
        raise ConfigError("--trust and --allow-unsigned exclude each other: is the release signed or not?")
    asked = read_trust(trust) if trust else None
    manifest, signature = read_manifest(folder), read_signature(folder)
    if signature is None:
        if not allow_unsigned:
            raise SignatureError(
                f"'{folder}' is not signed, so nobody vouches for it: --allow-unsigned takes it all the same, "
                "as for one that you made yourself"
            )
        return read_release(folder), ["this release is not signed: nobody vouches for it"]
    study, key = _study_name(manifest, folder), signature.key
    if asked is not None and asked.study not in (None, study):
        raise SignatureError(
            f"the release is of study '{study}', the kit that --trust names is of '{asked.study}', whose key says "
            f"nothing about it: give the kit.json of '{study}'"
        )
    given = None if asked is None else asked.key
    trusted = [given] if given is not None else remembered(study)
    if public_line(key) not in {public_line(one) for one in trusted}:
        raise SignatureError(_untrusted(study, key, given))
    check_manifest(manifest, signature, trusted)
    release = dataclasses.replace(read_release(folder), signed_by=fingerprint(key))
    if release.manifest != manifest:
        raise ReleaseError(f"'{folder}' changed while it was read: try again")
    return release, [] if given is None else remember(study, given)


def read_trust(text: str) -> Trust:
    """A public key: one line of OpenSSH's format, a file that holds one, or a kit.json, which names its study, too.

    Raises:
        SignatureError: none of these.
    """
    if text.startswith(("ssh-", "ecdsa-")):
        return Trust(read_public_line(text), None)
    path = Path(text)
    try:
        content = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise SignatureError(
            f"'{text[:100]}' is neither a public key (ssh-ed25519 ...) nor a file that holds one"
        ) from error
    if not content.startswith("{"):
        return Trust(read_public_line(content), None)
    try:
        kit = json.loads(content)
        line, study = str(kit["public_key"]), kit["study"]
    except (ValueError, KeyError, RecursionError) as error:
        raise SignatureError(f"'{path}' names no public_key and study: give the kit.json of a site's kit") from error
    if not is_line(study):
        raise SignatureError(f"'{path}' names its study by no plain line: give the kit.json of a site's kit")
    return Trust(read_public_line(line), _one_spaced(study))


def trusted_keys_file() -> Path:
    """Where trusted keys are remembered."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    # a relative path is to be ignored, says the XDG specification
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".config") / "latent-drift" / "trusted_keys"


def remembered(study: str) -> list[PublicKey]:
    """The keys that may sign releases of a study; raises `SignatureError` for a file that cannot be read."""
    return [key for key, name in _entries() if name == study]


def remember(study: str, key: PublicKey) -> list[str]:
    """Trust a key for a study from now on; returns what to tell the user, nothing when it was known."""
    entries = _entries()
    if any(name == study and public_line(one) == public_line(key) for one, name in entries):
        return []
    path = trusted_keys_file()
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    text += "" if not text or text.endswith("\n") else "\n"
    try:
        write_bytes(path, (text + f"{public_line(key)} {study}\n").encode())
    except CheckpointError:  # a home that is read-only; the key was given, so the work can go on
        return [f"{fingerprint(key)} cannot be remembered in {path}: give --trust next time, too"]
    others = [fingerprint(one) for one, name in entries if name == study]
    return [
        f"from now on {fingerprint(key)} is trusted for releases of '{study}': remembered in {path}",
        *(
            f"note: '{study}' has another trusted key already, {other}: unless its people say that they have both, "
            "remove the line of the wrong one"
            for other in others
        ),
    ]


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
        raise ReleaseError(f"'{folder}' is not a whole release (no study's name): copy it again")
    return _one_spaced(str(name))


def _one_spaced(name: str) -> str:
    return " ".join(name.split())


def _untrusted(study: str, key: PublicKey, given: PublicKey | None) -> str:
    if given is not None:
        return f"the release is signed by {fingerprint(key)}, not by the key that --trust names, {fingerprint(given)}"
    return (
        f"the release of '{study}' is signed by {fingerprint(key)}, which you have not trusted yet: if the study's "
        f"people confirm this fingerprint, add --trust '{public_line(key)}' once"
    )
