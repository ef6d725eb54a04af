"""What a release can and cannot do, in sentences, from the evaluation that its manifest holds and its signature covers.

An evaluation (`ld-evaluate` writes it as `evaluation.json`, `ld-server release --evaluation` signs it) has

    editor, patients     what was judged, on how many test patients
    edits                by kind of edit: `attributes` that it changes, `cases`, and with 95 % intervals `gain_db`,
                         `error_over_same` of the first biomarker's growth, `r`
    reached              by category, the share of answers from which a classifier reads the target
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

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
    return sentences


def all_abilities(evaluation: Mapping[str, Any]) -> list[str]:
    """Sentences about everything that was judged, for the card."""
    named = [numbers.get("attributes") for numbers in _edits(evaluation).values()]
    changed = {str(name) for names in named if isinstance(names, list) for name in names}
    reached = evaluation.get("reached")
    return abilities(evaluation, changed | set(reached if isinstance(reached, Mapping) else ()))


def _edits(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    edits = evaluation.get("edits")
    if not isinstance(edits, Mapping):
        return {}
    return {str(name): numbers for name, numbers in edits.items() if isinstance(numbers, Mapping)}


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
