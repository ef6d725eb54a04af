"""Elements of DICOM headers as people write them: a wrong value of one element costs that element, not the file."""

from __future__ import annotations

import datetime
import functools
import math
import re
from typing import Any

from pydicom import Dataset
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag

BINARY_VRS = frozenset(("US", "SS", "UL", "SL", "UV", "SV", "FL", "FD", "AT", "OB", "OW", "OF", "OD", "OL", "OV", "SQ"))
PLAIN_TEXT = re.compile(rb"[ -\[\]-}]*\0?")
"""Bytes that mean the same in every character set of DICOM, and are one value."""


def texts(dataset: Dataset, keyword: str) -> list[str]:
    """An element's values as text, without the spaces around them; empty where it is absent, empty or binary.

    They are read as they stand in the file, so a value that its VR does not allow is still there.
    """
    tag = _tag(keyword)
    element = None if tag is None else dataset.get_item(tag)
    if tag is None or element is None:
        return []
    if isinstance(element, RawDataElement):
        content = element.value
        known = element.VR if element.VR not in (None, "UN") else dictionary_VR(tag)
        if known == "US" and isinstance(content, bytes) and len(content) == 2:
            return [str(int.from_bytes(content, "little" if element.is_little_endian else "big"))]
        if known.split(" or ")[0] in BINARY_VRS or not isinstance(content, bytes):
            return [str(value) for value in _several(dataset[tag].value)]
        words = content.decode("latin-1").strip("\0 ").split("\\")
    else:
        words = [str(value) for value in _several(element.value)]
    return [word.strip("\0 ") for word in words] if any(words) else []


def has(dataset: Dataset, keyword: str) -> bool:
    """Whether an element is there, be it empty."""
    tag = _tag(keyword)
    return tag is not None and dataset.get_item(tag) is not None


def decoded(dataset: Dataset, keyword: str) -> str:
    """An element's text in its data set's character set, with spaces before it but not after it; empty where absent."""
    tag = _tag(keyword)
    element = None if tag is None else dataset.get_item(tag)
    if tag is None or element is None:
        return ""
    content = element.value
    if isinstance(element, RawDataElement) and isinstance(content, bytes) and PLAIN_TEXT.fullmatch(content):
        return content.rstrip(b"\0 ").decode("ascii")
    return str(dataset[tag].value or "")


def text(dataset: Dataset, keyword: str) -> str:
    """The first value of `texts` in upper case, or an empty text."""
    return next(iter(texts(dataset, keyword)), "").upper()


def uid(dataset: Dataset, keyword: str) -> str:
    """A UID as it stands in the file, or an empty text; pydicom's own access judges each, which takes longer."""
    return "\\".join(texts(dataset, keyword))


def decimals(dataset: Dataset, keyword: str, count: int) -> list[float] | None:
    """`count` finite numbers, with a point or a comma; None where the element holds something else."""
    try:
        numbers = [float(word.replace(",", ".")) for word in texts(dataset, keyword)]
    except ValueError:
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def decimal(dataset: Dataset, keyword: str) -> float | None:
    """One number of `decimals`."""
    numbers = decimals(dataset, keyword, 1)
    return None if numbers is None else numbers[0]


def whole(dataset: Dataset, keyword: str) -> int | None:
    """A whole number; None where the element holds something else."""
    number = decimal(dataset, keyword)
    return int(number) if number is not None and number.is_integer() else None


def date(dataset: Dataset, *keywords: str) -> datetime.date | None:
    """The first of several dates that is there; of a date with a time, the date."""
    for keyword in keywords:
        digits = text(dataset, keyword).replace(".", "")[:8]  # ACR-NEMA wrote 2004.01.19
        if len(digits) == 8 and digits.isdigit():
            try:
                return datetime.date.fromisoformat(digits)
            except ValueError:
                continue
    return None


def items(dataset: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; empty where it is absent."""
    tag = _tag(keyword)
    return list(dataset[tag].value or []) if tag is not None and tag in dataset else []


@functools.cache
def _tag(keyword: str) -> BaseTag | None:
    number = tag_for_keyword(keyword)
    return None if number is None else BaseTag(number)


def _several(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if not isinstance(value, str | bytes) and hasattr(value, "__iter__") else [value]
