"""The ranges of attributes that a release's sites had scans of, coarse enough to leave a hospital.

A site reports the ends of each number only as far as several patients reach them, rounded outwards, and a category only
if several patients show it, so that no patient can be identified. Attributes are reported one by one: scans of old and
of ill patients do not imply a patient who was both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ld_common.imaging.modality import AttributeConfig, Attributes, Modality, Value

PARTS = 20
"""Ends are rounded outwards to this many equal parts of an attribute's bounds."""
Range = tuple[float, float]


def site_coverage(
    modality: Modality, patients: Sequence[str], attributes: Sequence[Attributes], fewest: int
) -> list[float]:
    """A site's coverage, attribute after attribute: lowest and highest of a number, 1 or 0 for each category.

    Args:
        modality: the attributes, in their order.
        patients: patient of each scan.
        attributes: attributes of each scan.
        fewest: patients needed for each end and each category; with fewer, a number's ends are its bounds swapped.
    """
    coverage: list[float] = []
    for name, config in modality.attributes.items():
        by_patient: dict[str, list[Value]] = {}
        for patient, values in zip(patients, attributes, strict=True):
            by_patient.setdefault(patient, []).append(values[name])
        if config.categories:
            counts = [sum(category in values for values in by_patient.values()) for category in config.categories]
            coverage += [float(count >= fewest) for count in counts]
            continue
        ends = [(min(map(float, values)), max(map(float, values))) for values in by_patient.values()]
        if len(ends) < fewest:
            coverage += [config.maximum, config.minimum]
            continue
        lowest = sorted(low for low, _ in ends)[fewest - 1]
        highest = sorted((high for _, high in ends), reverse=True)[fewest - 1]
        coverage += _rounded(config, lowest, highest)
    return coverage


def trained_on(modality: Modality, rounds: Sequence[dict[str, Any]]) -> dict[str, Range | list[str]] | None:
    """The union of the coverage of the last counted round's sites; None if no site reports one.

    Args:
        modality: the attributes, in their order.
        rounds: records of the rounds, as a manifest holds them.
    """
    counted = [record["sites"].values() for record in rounds if record.get("counted")]
    size = sum(len(config.categories) or 2 for config in modality.attributes.values())
    reports = [site.get("coverage") or [] for site in (counted[-1] if counted else [])]
    reports = [report for report in reports if len(report) == size]
    if not reports:
        return None
    ranges: dict[str, Range | list[str]] = {}
    at = 0
    for name, config in modality.attributes.items():
        if config.categories:
            rows = enumerate(config.categories, start=at)
            ranges[name] = [category for row, category in rows if any(report[row] for report in reports)]
        else:
            ranges[name] = min(report[at] for report in reports), max(report[at + 1] for report in reports)
        at += len(config.categories) or 2
    return ranges


def beyond(modality: Modality, ranges: dict[str, Range | list[str]] | None, attributes: Attributes) -> list[str]:
    """A sentence for each attribute outside the sites' ranges; none if the ranges are not known."""
    sentences = []
    for name, seen in (ranges or {}).items():
        if name not in attributes:
            continue
        value, unit = attributes[name], modality.attributes[name].unit
        if isinstance(seen, list):
            if value not in seen:
                sentences.append(f"{name} {value}: the sites had scans of {', '.join(seen) or 'none'}")
        elif not seen[0] <= float(value) <= seen[1]:
            extent = f"of {seen[0]:g} to {seen[1]:g} {unit}".strip() if seen[0] <= seen[1] else "of too few patients"
            sentences.append(f"{name} {float(value):g}: the sites had scans {extent}, beyond is extrapolated")
    return sentences


def _rounded(config: AttributeConfig, lowest: float, highest: float) -> list[float]:
    part = (config.maximum - config.minimum) / PARTS
    below, above = math.floor((lowest - config.minimum) / part), math.ceil((highest - config.minimum) / part)
    return [config.minimum + below * part, config.minimum + above * part]
