"""The part of an evaluation that a release may publish: numbers over patients, none of a single one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ld_common.release.abilities import KEYS

if TYPE_CHECKING:
    from ld_evaluate.edits import EvaluationEdit

COUNT_STEP = 5
"""Counts of patients are published in multiples of this."""
FEWEST = 5
"""Fewest patients of an edit whose numbers are published."""


def public_evaluation(run: dict[str, Any], asked: Sequence[EvaluationEdit]) -> dict[str, Any]:
    """One editor's result as `ld_common.release.abilities` reads it.

    Args:
        run: of `evaluate_release`, or a mapping with `editor`, `biomarkers`, `by_edit`, `metrics` and `counts`, and
            `bands` and `cohort` where they are known.
        asked: the edits that were judged.
    """
    changed: dict[str, set[str]] = {}
    for edit in asked:
        changed.setdefault(edit.name, set()).update(edit.target)
    biomarker = run["biomarkers"][0] if run["biomarkers"] else ""
    edits = {}
    for name, numbers in run["by_edit"].items():
        if numbers["cases"] < FEWEST:
            continue
        entry: dict[str, Any] = {"attributes": sorted(changed.get(name, ())), "cases": _count(numbers["cases"])}
        for key in KEYS:
            source = key if key == "gain_db" else f"{biomarker}_{key}"
            for end in ("", "_low", "_high"):
                if source + end in numbers:
                    entry[key + end] = round(float(numbers[source + end]), 3)
        edits[name] = entry
    reached = {
        key.removesuffix("_reached"): round(float(value), 3)
        for key, value in run["metrics"].items()
        if key.endswith("_reached")
    }
    return {
        "editor": run["editor"],
        "patients": _count(run["counts"]["patients"]),
        "edits": edits,
        "reached": reached,
        **{name: _rounded_counts(run[name]) for name in ("bands", "cohort") if run.get(name)},
    }


def _rounded_counts(value: Any) -> Any:
    """The same with every whole number, which counts patients or answers, as published counts are."""
    if isinstance(value, dict):
        return {key: _rounded_counts(content) for key, content in value.items()}
    if isinstance(value, list):
        return [_rounded_counts(content) for content in value]
    return _count(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _count(value: float) -> int:
    return max(COUNT_STEP, COUNT_STEP * round(value / COUNT_STEP))
