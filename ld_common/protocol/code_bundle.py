"""The code that a study runs at its sites: these packages, as they are installed."""

from __future__ import annotations

import contextlib
import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("ld_common", "ld_client")
DISTRIBUTIONS = ("latent-drift-federation", "latent-drift-client")
"""What holds them: all of this software, or a hospital's wheel."""


def installed_sources() -> dict[str, bytes]:
    """The sources of `PACKAGES` as they are installed here, by the names that a bundle gives them."""
    files = {}
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        for place in [] if found is None else found.submodule_search_locations or []:
            for source in sorted(Path(place).rglob("*.py")):
                files[f"{package}/{source.relative_to(place).as_posix()}"] = source.read_bytes()
    return files


def installed_version() -> str:
    """This software's version, whether all of it is installed or a hospital's wheel."""
    for name in DISTRIBUTIONS:
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return "of no installed package"
