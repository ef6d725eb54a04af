"""What a release's sites had scans of, told coarsely enough to leave a hospital, and what lies beyond it.

A site tells the ends of each number by so many patients, rounded outwards, and which words so many patients show, so
that no single patient can be read off it. Attributes are told one by one: that old and ill patients were seen does not
say that any was both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ld_common.imaging.modality import AttributeConfig, Attributes, Modality, Value

PARTS = 20
"""Ends are rounded to so many equal parts of an attribute's bounds."""
Range = tuple[float, float]


def site_coverage(
    modality: Modality, patients: Sequence[str], attributes: Sequence[Attributes], fewest: int
) -> list[float]:
    """What a site has scans of, attribute after attribute: a number's lowest and highest, 1 or 0 for each word.

    Args:
        modality: the attributes, in their order.
        patients: whose each scan is.
        attributes: what each shows.
        fewest: patients that each end and each word speaks for; with fewer a number's ends are its bounds exchanged.
    """
    told: list[float] = []
    for name, known in modality.attributes.items():
        own: dict[str, list[Value]] = {}
        for patient, values in zip(patients, attributes, strict=True):
            own.setdefault(patient, []).append(values[name])
        if known.categories:
            told += [float(sum(word in values for values in own.values()) >= fewest) for word in known.categories]
            continue
        ends = [(min(map(float, values)), max(map(float, values))) for values in own.values()]
        if len(ends) < fewest:
            told += [known.maximum, known.minimum]
            continue
        lowest = sorted(low for low, _ in ends)[fewest - 1]
        highest = sorted((high for _, high in ends), reverse=True)[fewest - 1]
        told += _rounded(known, lowest, highest)
    return told


def trained_on(modality: Modality, rounds: Sequence[dict[str, Any]]) -> dict[str, Range | list[str]] | None:
    """What the sites of the last counted round had scans of together; None where none of them says.

    Args:
        modality: the attributes, in their order.
        rounds: records of the rounds, as a manifest holds them.
    """
    counted = [one["sites"].values() for one in rounds if one.get("counted")]
    size = sum(len(known.categories) or 2 for known in modality.attributes.values())
    told = [site.get("coverage") or [] for site in (counted[-1] if counted else [])]
    told = [one for one in told if len(one) == size]
    if not told:
        return None
    found: dict[str, Range | list[str]] = {}
    at = 0
    for name, known in modality.attributes.items():
        if known.categories:
            found[name] = [word for row, word in enumerate(known.categories, start=at) if any(one[row] for one in told)]
        else:
            found[name] = min(one[at] for one in told), max(one[at + 1] for one in told)
        at += len(known.categories) or 2
    return found


def beyond(modality: Modality, known: dict[str, Range | list[str]] | None, asked: Attributes) -> list[str]:
    """A sentence for each attribute that lies outside what the sites had scans of; none where that is not known."""
    sentences = []
    for name, seen in (known or {}).items():
        if name not in asked:
            continue
        value, unit = asked[name], modality.attributes[name].unit
        if isinstance(seen, list):
            if value not in seen:
                sentences.append(f"{name} {value}: the sites had scans of {', '.join(seen) or 'none'}")
        elif not seen[0] <= float(value) <= seen[1]:
            spoken = f"of {seen[0]:g} to {seen[1]:g} {unit}".strip() if seen[0] <= seen[1] else "of too few patients"
            sentences.append(f"{name} {float(value):g}: the sites had scans {spoken}, beyond is extrapolated")
    return sentences


def _rounded(known: AttributeConfig, lowest: float, highest: float) -> list[float]:
    part = (known.maximum - known.minimum) / PARTS
    below, above = math.floor((lowest - known.minimum) / part), math.ceil((highest - known.minimum) / part)
    return [known.minimum + below * part, known.minimum + above * part]
