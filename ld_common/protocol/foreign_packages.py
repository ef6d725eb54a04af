"""Packages of others that a deployed study uses, each by name, version and a digest of its installed files.

The code bundle holds none of their code. Every site installs the same distribution itself, and compares its digest with
the approved one before each round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, PackagePath, distribution
from typing import Any

from ld_common.core.errors import ApprovalError, DeploymentError
from ld_common.core.registry import normalized
from ld_common.protocol.keys import is_digest, is_line

SITES, SERVER = "sites", "server"
"""Where a package's code runs: an aggregator's at the server only."""
NOT_DIGESTED = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
"""Files of a `.dist-info` folder that differ between two installations of one wheel."""


@dataclass(frozen=True)
class PackageRecord:
    """A package as a kit lists it and an approval records it."""

    name: str
    version: str
    sha256: str
    """`package_digest` of its installed files."""
    runs_at: str = SITES

    def is_sound(self) -> bool:
        """Whether each field is as this software writes it."""
        return (
            is_line(self.name) and is_line(self.version) and is_digest(self.sha256) and self.runs_at in (SITES, SERVER)
        )


def read_records(entries: Sequence[dict[str, str]]) -> list[PackageRecord]:
    """The records of a manifest or an approval; raises `TypeError` or `ValueError` for anything else."""
    if not isinstance(entries, list):
        raise TypeError("the list of packages is not a list")
    records = [PackageRecord(**entry) for entry in entries]
    if not all(record.is_sound() for record in records) or len({normalized(one.name) for one in records}) < len(
        records
    ):
        raise ValueError("the list of packages is malformed")
    return records


def installed_package(name: str, runs_at: str = SITES) -> PackageRecord:
    """The record of a package as it is installed here.

    Raises:
        DeploymentError: it is not installed, is installed in editable mode, or lacks a file.
    """
    try:
        found = distribution(name)
    except (PackageNotFoundError, ValueError) as error:
        raise DeploymentError(f"package '{name}' is not installed: install it with pip install {name}") from error
    return PackageRecord(str(found.metadata["Name"]), found.version, package_digest(found), runs_at)


def package_digest(found: Distribution) -> str:
    """SHA-256 over the names and contents of a distribution's files, sorted, in hex.

    Left out are compiled caches, `NOT_DIGESTED`, and scripts outside `site-packages`, which name the local interpreter.

    Raises:
        DeploymentError: an editable installation, whose files may change at any time, or a file that is missing.
    """
    name = str(found.metadata["Name"])
    if _is_editable(found):
        raise DeploymentError(f"package '{name}' is installed in editable mode: install its wheel, which has a digest")
    digest = hashlib.sha256()
    for path in sorted(_digested_files(found), key=lambda path: path.as_posix()):
        try:
            content = found.locate_file(path).read_bytes()  # type: ignore[attr-defined]
        except OSError as error:
            raise DeploymentError(f"package '{name}' lacks its file '{path}': install it again") from error
        digest.update(json.dumps([path.as_posix(), len(content)]).encode() + b"\n" + content)
    return digest.hexdigest()


def check_installed(records: Sequence[PackageRecord]) -> None:
    """Compare the packages that run at sites with what is installed here; raises `ApprovalError` where one differs."""
    for record in records:
        if record.runs_at != SITES:
            continue
        try:
            here = installed_package(record.name)
        except DeploymentError as error:
            raise ApprovalError(f"the study needs package {record.name} {record.version}: {error}") from error
        if here.sha256 != record.sha256:
            raise ApprovalError(
                f"package {record.name} {here.version} is not the approved one ({record.version}, sha256 "
                f"{record.sha256[:16]}..., installed {here.sha256[:16]}...): install the study's wheel of it"
            )


def site_packages(records: Sequence[PackageRecord]) -> list[str]:
    """Names of the packages that run at sites."""
    return [record.name for record in records if record.runs_at == SITES]


def _digested_files(found: Distribution) -> Iterator[PackagePath]:
    for path in found.files or []:
        cached = "__pycache__" in path.parts or path.suffix == ".pyc"
        bookkeeping = path.name in NOT_DIGESTED and path.parent.name.endswith(".dist-info")
        if not (cached or bookkeeping or path.parts[0] == ".."):
            yield path


def _is_editable(found: Distribution) -> bool:
    if found.files is None or any(path.name.startswith("__editable__") for path in found.files):
        return True
    text = found.read_text("direct_url.json")
    origin: Any = json.loads(text) if text else {}
    return bool(origin.get("dir_info", {}).get("editable", False))
