"""What a site may be called: its name becomes a file's, a label and a word on command lines."""

from __future__ import annotations

import re

from ld_common.core.config import is_number, require

RESERVED_NAMES = RELEASE, AUTO = ("release", "auto")
"""Words that `ld-generate --drift` knows; no site can be called so."""
MOST_LETTERS = 64
"""What the common name of a certificate holds."""
NAME_RULE = (
    f"use a letter, then letters, digits, _ . -, at most {MOST_LETTERS} in all, and none of {', '.join(RESERVED_NAMES)}"
)


def check_site_name(name: str) -> None:
    """Refuse a name that files, labels or commands would stumble over; raises `ConfigError`."""
    plain = bool(re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", name)) and len(name) <= MOST_LETTERS
    require(plain and name not in RESERVED_NAMES and not is_number(name), f"'{name}' cannot name a site: {NAME_RULE}")
