"""Drawn growth over the years of single patients: whether it goes on, how far off it is, and whether bands hold it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ld_common.core.errors import RequestError
from ld_common.metrics.bands import coverage, fit_band
from ld_simulations.benchmarks.individual.answers import DRIFT, DRIFT_HISTORY, SAME, Record

CURVE = {"age_plus_5": 5, "age_plus_10": 10, "age_plus_15": 15, "age_plus_20": 20}
"""Years of the questions that make a patient's curve."""


def curve_numbers(records: Sequence[Record]) -> dict[str, Any]:
    """Drawn growth over 5, 10, 15 and 20 years: how often it grows on, and its error over a straight line's.

    The straight line is every patient's mean true growth a year, times the years.
    """
    curves: dict[str, dict[int, Record]] = {}
    for record in records:
        if record["row"] == DRIFT and record["question"] in CURVE:
            curves.setdefault(record["patient"], {})[CURVE[record["question"]]] = record
    whole = [curve for curve in curves.values() if len(curve) == len(CURVE)]
    if not whole:
        return {}
    drawn, true = (
        np.array([[curve[years][key] for years in CURVE.values()] for curve in whole])
        for key in ("growth_mm2", "true_growth_mm2")
    )
    years = np.array(list(CURVE.values()))
    line = np.outer(np.ones(len(whole)), years * float((true / years).mean()))
    steps = np.diff(np.concatenate([np.zeros((len(whole), 1)), drawn], 1), axis=1)
    return {
        "trajectory_monotone_share": float((steps > 0).all(1).mean()),
        "trajectory_error_over_straight_line": float(np.abs(drawn - true).mean() / np.abs(line - true).mean()),
    }


def band_numbers(records: Sequence[Record]) -> dict[str, Any]:
    """How many of the true growths a band holds that other test patients calibrated; for one scan and with a history.

    Every second patient calibrates a 90 % band (`ld_common.metrics.bands`) for the rest, and the rest for these. Any
    answer can be given a band that covers; how wide it is beside that of *same change for all* tells what it is worth.
    """
    numbers = {}
    for row, suffix in ((DRIFT, ""), (DRIFT_HISTORY, "_history_3"), (SAME, "_same_change_for_all")):
        asked = [record for record in records if record["row"] == row and _tells_growth(record, row)]
        names = sorted({record["patient"] for record in asked})
        halves = [[record for record in asked if record["patient"] in names[side::2]] for side in (0, 1)]
        try:
            shares = [_coverage(*pair) for pair in (halves, halves[::-1])]
        except RequestError:  # too few patients
            continue
        numbers[f"band_coverage_90{suffix}"] = float(np.mean([share for share, _ in shares]))
        numbers[f"band_half_width_10_years_mm2{suffix}"] = float(np.mean([width for _, width in shares]))
    return numbers


def _tells_growth(record: Record, row: str) -> bool:
    return record["growth_mm2"] is not None and (row == DRIFT_HISTORY or record["question"] in CURVE)


def _coverage(calibrating: Sequence[Record], held_back: Sequence[Record]) -> tuple[float, float]:
    band = fit_band(*_errors(calibrating))
    return coverage(band, *_errors(held_back)), float(band.half_width(10.0))


def _errors(records: Sequence[Record]) -> tuple[list[float], list[float], list[str]]:
    return (
        [record["growth_mm2"] - record["true_growth_mm2"] for record in records],
        [record["years"] for record in records],
        [record["patient"] for record in records],
    )
