"""What a release can and cannot do, in sentences, from the evaluation that its manifest holds and its signature covers.

An evaluation (`ld-evaluate` writes it as `evaluation.json`, `ld-server release --evaluation` signs it) has

    editor, patients     what was judged, on how many test patients
    edits                by kind of edit: `attributes` that it changes, `cases`, and with 95 % intervals `gain_db`,
                         `error_over_same` of the first biomarker's growth, `r`
    reached              by category, the share of answers from which a classifier reads the target
    bands                of the growth of one `biomarker`, where 20 test patients or more have a known truth:
                         `one_scan`, and `history` for answers that earlier visits calibrated. Each has the numbers of
                         `ld_common.metrics.bands.Band`: over t years the truth lies within factor * sqrt(noise_mm2² +
                         (noise_mm2_per_year t)²) of the drawn change in a share `level` of the answers; it was judged
                         up to `longest_years`. `truth` counts the patients by where their truth comes from: real
                         `follow_ups`, or `true_counterfactuals` of simulated patients. `history` holds for histories
                         of a spread of `least_spread_years2` or more
    cohort               `curves` of the same `biomarker` against age, one for each combination of categories with five
                         patients or more, each as `ld_common.metrics.cohort.CohortCurve`

Counts of patients and answers are multiples of 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ld_common.imaging.modality import AGE
from ld_common.release.age_calibration import read_age_calibration

SENTENCE_YEARS = 10.0
"""Time for which the bands are told in a sentence."""
KEYS = ("gain_db", "error_over_same", "r")
"""Numbers of an edit; each may have `_low` and `_high` beside it."""


def abilities(evaluation: Mapping[str, Any], attributes: Iterable[str]) -> list[str]:
    """Sentences about edits of these attributes; empty where the evaluation says nothing of them."""
    asked, sentences = set(attributes), []
    for name, numbers in _edits(evaluation).items():
        changed = numbers.get("attributes")
        if isinstance(changed, list) and changed and set(map(str, changed)) <= asked:
            sentences += _of_edit(name, numbers)
    reached = evaluation.get("reached")
    for name in sorted(asked):
        share = reached.get(name) if isinstance(reached, Mapping) else None
        if _is_number(share):
            sentences.append(f"{name}: a classifier reads the target off {share:.0%} of the answers".replace("%", " %"))
    return sentences + (_of_bands(evaluation) if AGE in asked else [])


def all_abilities(evaluation: Mapping[str, Any]) -> list[str]:
    """Sentences about everything that was judged, for the card."""
    named = [numbers.get("attributes") for numbers in _edits(evaluation).values()]
    changed = {str(name) for names in named if isinstance(names, list) for name in names}
    reached = evaluation.get("reached")
    bands = {AGE} if isinstance(evaluation.get("bands"), Mapping) else set()
    return abilities(evaluation, changed | bands | set(reached if isinstance(reached, Mapping) else ()))


def _edits(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    edits = evaluation.get("edits")
    if not isinstance(edits, Mapping):
        return {}
    return {str(name): numbers for name, numbers in edits.items() if isinstance(numbers, Mapping)}


def _of_bands(evaluation: Mapping[str, Any]) -> list[str]:
    calibration, sentences = read_age_calibration(evaluation), []
    for kind, band in (("one scan", calibration.one_scan), ("several visits", calibration.history)):
        if band is not None and band.longest_years > 0:
            years = min(SENTENCE_YEARS, band.longest_years)
            share, width = f"{100 * band.level:.0f} %", float(band.half_width(years))
            sentences.append(
                f"age, from {kind} ({band.patients} test patients): the true change of the {calibration.biomarker} "
                f"over {years:g} years was within {width:.0f} mm2 of the drawn one in {share} of the answers"
            )
    return sentences


def _of_edit(name: str, numbers: Mapping[str, Any]) -> list[str]:
    where = f"{name.replace('_', ' ')} ({numbers.get('cases', '?')} test patients)"
    parts = []
    if _is_number(numbers.get("gain_db")):
        gain, high = float(numbers["gain_db"]), numbers.get("gain_db_high")
        far = _is_number(high) and float(high) <= 0  # type: ignore[arg-type]
        parts.append(
            "no nearer to the truth than the unedited scan"
            if far or gain <= 0
            else f"{gain:.1f} dB nearer to the truth than the unedited scan"
        )
    if _is_number(numbers.get("error_over_same")):
        parts.append(_single_patient(numbers))
    return [f"{where}: {'; '.join(parts)}"] if parts else []


def _single_patient(numbers: Mapping[str, Any]) -> str:
    ratio = float(numbers["error_over_same"])
    low, high = (numbers.get(f"error_over_same_{end}") for end in ("low", "high"))
    text = f"a patient's change is off by {ratio:.2f} times what the same change for everybody is"
    if _is_number(high) and float(high) < 1:  # type: ignore[arg-type]
        return f"{text}: it tells patients apart"
    if _is_number(low) and float(low) > 1:  # type: ignore[arg-type]
        return f"{text}: it does not tell who changes faster"
    return f"{text}: not better and not worse than that rule"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
