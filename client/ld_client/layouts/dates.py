"""Dates and days as tables and paths have them."""

from __future__ import annotations

import datetime
import re

_OF_FOLDER = re.compile(r"(\d{4}-\d{2}-\d{2})_\d{2}_\d{2}_\d{2}(?:\.\d+)?")
"""A date and time as the folders of ADNI have it: 2010-05-12_10_11_12.0."""
_OF_DAY = re.compile(r"d?(?:ay)?[-_]?(-?\d+)", re.IGNORECASE)


def date_of(text: str, date_format: str = "") -> datetime.date | None:
    """A date in ISO 8601 (also 20100512, and with a time), as a folder of ADNI, or of a format of strptime; or None."""
    match = _OF_FOLDER.fullmatch(text)
    try:
        if date_format:
            return datetime.datetime.strptime(text, date_format).date()
        return datetime.datetime.fromisoformat(match[1] if match else text).date()
    except ValueError:
        return None


def day_of(text: str) -> int | None:
    """A whole number of days, such as 129, d0129 or 129.0; or None."""
    match = _OF_DAY.fullmatch(text.removesuffix(".0"))
    return int(match[1]) if match else None
