"""The words of tables as values of the modality, where there is no doubt what they mean."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from ld_common.imaging.modality import AGE, AttributeConfig

BLANK = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-", "."})
_ALZHEIMER = (
    "alzheimer",
    "alzheimers",
    "alzheimer's",
    "alzheimer disease",
    "alzheimers disease",
    "alzheimer's disease",
)
_HEALTHY = ("cn", "nc", "nl", "hc", "control", "controls", "healthy", "healthy control", "healthy controls")
SYNONYMS: dict[str, dict[str, tuple[str, ...]]] = {
    "sex": {"F": ("female", "f", "woman"), "M": ("male", "m", "man")},
    "diagnosis": {
        "CN": (*_HEALTHY, "normal", "normal control", "cognitively normal", "cognitively unimpaired"),
        "MCI": ("mci", "mild cognitive impairment"),
        "AD": ("ad", *_ALZHEIMER),
    },
}
"""Attribute -> value -> words in lower case that stand for it; used where the modality has the value."""
_DECIMAL_COMMA = re.compile(r"-?\d+,\d{1,2}")


def is_blank(cell: str) -> bool:
    """Whether a cell says nothing."""
    return cell.lower() in BLANK


def value_of(name: str, kind: AttributeConfig, word: str, extra: Mapping[str, str]) -> tuple[str, str]:
    """The modality's value of a word, and the problem with it ("" if none).

    Args:
        name: the attribute.
        kind: its description in the modality.
        word: as the table has it.
        extra: further words in lower case, and their values.

    Returns:
        value and problem: "" and a problem for a word without a value; a number and a problem for one out of range. A
        number with a unit stays as it is.
    """
    for _ in range(2):  # 2 may be a level called patient, and --map says what patient stands for
        word = extra.get(word.lower(), word)
    if not kind.categories:
        return _number(name, kind, word)
    if word in kind.categories:
        return word, ""
    lower = word.lower()
    values = [value for value, text in kind.categories.items() if lower in (value.lower(), text.lower())]
    synonyms = SYNONYMS.get(name, {})
    values = values or [value for value in kind.categories if lower in synonyms.get(value, ())]
    if len(values) == 1:
        return values[0], ""
    known = ", ".join(kind.categories)
    return "", f"{name} '{word}' is none of {known}; --map \"{name}:{word}=VALUE\" takes it"


def _number(name: str, kind: AttributeConfig, word: str) -> tuple[str, str]:
    text = word.replace(",", ".") if _DECIMAL_COMMA.fullmatch(word) else word
    try:
        number = float(text)
    except ValueError:
        return ("", f"age '{word}' is not a number") if name == AGE else (word, "")
    if not (math.isfinite(number) and kind.minimum <= number <= kind.maximum):
        return text, f"{name}={text} is not within {kind.minimum:g} to {kind.maximum:g} {kind.unit}".rstrip()
    return text, ""


def age_text(years: float) -> str:
    """An age in years as a cell, to a hundredth."""
    return f"{years:.2f}".rstrip("0").rstrip(".")
