"""Names of sites, which become file names, labels and command-line arguments, and of files that are a site's own."""

from __future__ import annotations

import re

from ld_common.core.config import is_number, require

RESERVED_NAMES = RELEASE, AUTO = ("release", "auto")
"""Values of `ld-generate --drift`, which cannot name a site."""
OWN_PART = "own"
"""Kind of the files in which a site keeps the factors that are its own, in their metadata and their folder's name."""
MAX_LENGTH = 64
"""Length of a certificate's common name."""
NAME_RULE = (
    f"use a letter, then letters, digits, _ . -, at most {MAX_LENGTH} in all, and none of {', '.join(RESERVED_NAMES)}"
)


def check_site_name(name: str) -> None:
    """Raise `ConfigError` for a name that cannot be used in files, labels and commands."""
    plain = bool(re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", name)) and len(name) <= MAX_LENGTH
    require(plain and name not in RESERVED_NAMES and not is_number(name), f"'{name}' cannot name a site: {NAME_RULE}")
