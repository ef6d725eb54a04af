"""Checks a study's code bundle before any of it runs, and compares two bundles."""

from __future__ import annotations

import difflib
import io
import re
import tomllib
import zipfile
import zlib
from collections.abc import Mapping

from ld_common.core.archives import archive_problem
from ld_common.core.command import printable
from ld_common.core.errors import ApprovalError
from ld_common.protocol.code_bundle import PACKAGES

SOURCE = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:/[a-z_][a-z0-9_]*)*/[a-z_][a-z0-9_]*\.py")
OTHERS = ("pyproject.toml", "LICENSE", "study_server.py", ".info/CONTENT")
"""Metadata, the starter of the server's side, which no site runs, and Flower's list of files."""
CLIENT_APP = "ld_client.client_app:app"
MAX_BYTES, MAX_FILES = 32_000_000, 4096
UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, LookupError, TypeError, ValueError, RuntimeError)


def read_bundle(content: bytes) -> dict[str, bytes]:
    """The files of a bundle, by name.

    Flower puts the bundle's folder first on `sys.path`, so a file of another name could replace any module.

    Raises:
        ApprovalError: no archive, or one that holds anything but sources of `PACKAGES` and `OTHERS`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            problem = archive_problem(archive, MAX_BYTES, MAX_FILES)
            if problem is not None:
                raise ApprovalError(f"the code bundle {problem}: refused")
            names = archive.namelist()
            unexpected = [name for name in names if not (SOURCE.fullmatch(name) or name in OTHERS)]
            if unexpected:
                raise ApprovalError(
                    f"the code bundle holds {unexpected[0]!r}, not a source file of {' or '.join(PACKAGES)}: refused"
                )
            files = {name: archive.read(name) for name in sorted(names)}
        components = tomllib.loads(files["pyproject.toml"].decode())["tool"]["flwr"]["app"]["components"]
        if components["clientapp"] != CLIENT_APP:
            raise ApprovalError(f"the code bundle starts {components['clientapp']!r} here, not '{CLIENT_APP}': refused")
    except UNREADABLE as error:
        raise ApprovalError(
            f"the code bundle cannot be read ({type(error).__name__}): ask for the kit again"
        ) from error
    return files


def package_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The sources of `PACKAGES` among the files of a bundle."""
    return {name: content for name, content in files.items() if SOURCE.fullmatch(name)}


def differing_files(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[str]:
    """Names of the files that are not the same bytes in both."""
    return [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


def diff_lines(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[str]:
    """Their differences as `diff -u` prints them, with escapes for what is not printable."""
    lines: list[str] = []
    for name in differing_files(before, after):
        old, new = (_lines(files.get(name, b"")) for files in (before, after))
        lines += difflib.unified_diff(old, new, f"before/{name}", f"now/{name}", lineterm="")
    return lines


def _lines(content: bytes) -> list[str]:
    return [printable(line) for line in content.decode(errors="backslashreplace").split("\n")]
