"""The version of the installed software."""

from __future__ import annotations

import contextlib
import functools
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTIONS = ("latent-drift-federation", "latent-drift-client", "latent-drift-generate")
"""The whole software, a hospital's wheel, and the wheel of `ld-generate` alone."""


@functools.cache
def installed_version() -> str:
    """The version of whichever of `DISTRIBUTIONS` is installed."""
    for name in DISTRIBUTIONS:
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return "unknown (not installed as a package)"
