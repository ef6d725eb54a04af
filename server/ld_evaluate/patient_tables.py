"""What one patient's answer is worth: a table for each kind of edit in Markdown, and every answer as a row of a CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ld_evaluate.files import COPY, FOLLOW_UP, PERFECT, RULES, SAME

Run = dict[str, Any]
"""The result of one release asked through one editor with one seed, or of another method."""
READING = (
    "Compared is what is written into the pixels of the scan's file. *Gain* is the PSNR against the truth minus that "
    "of the unedited scan. *Growth* is the change of a structure's area, measured in the written picture without a "
    "network: its *error* is the mean over patients of the absolute difference from the true growth, beside that of "
    f"*{SAME}*; *r* is its correlation over patients within this kind of edit; the *share of the true* growth is best "
    f"at 1. Brackets hold 95 % bootstrap intervals over patients. *{COPY}* is the unedited scan. *{SAME}* is the mean "
    "change of the other patients, without a picture. The *ridges* are regressions on other patients' visits, without "
    f"options. *{PERFECT}* is the truth itself, written like the others. A method is of use where it beats the rules."
)

WORST, BEST = 5, 3
"""Patients that the page names, of each method and edit."""


def patient_sections(runs: Sequence[Run], ceilings: Mapping[str, float]) -> list[str]:
    """A section for each kind of edit whose truth is known.

    Args:
        runs: of one modality.
        ceilings: by edit, the highest r that a prediction from one scan can have; empty where no causal model tells.
    """
    lines: list[str] = []
    for edit in dict.fromkeys(edit for run in runs for edit in run["by_edit"]):
        lines += [f"### {edit.replace('_', ' ').capitalize()}", ""]
        if edit == FOLLOW_UP:
            lines += [_of_follow_ups(runs[0]), ""]
        methods = _methods(runs, edit)
        for number, biomarker in enumerate(runs[0]["biomarkers"] or [""]):
            lines += _table(methods, biomarker, ceilings.get(edit) if number == 0 else None)
            lines += _single(runs, edit, biomarker)
    return lines


def patients_csv(runs: Sequence[Run]) -> str:
    """Every answer to every patient's edit; of each method, seed and edit the worst first."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        labels = {"modality": run["modality"], "seed": run["seed"]}
        rules = {} if any(row["modality"] == run["modality"] for row in rows) else run["rule_patients"]
        rows += [labels | row for row in [*rules, *run["patients"]]]
    order = {answer: number for number, answer in enumerate(dict.fromkeys(row["answer"] for row in rows))}
    rows.sort(key=lambda row: (row["modality"], order[row["answer"]], row["seed"], row["edit"], -_badness(row)))
    table = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(table, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def _badness(row: Mapping[str, Any]) -> float:
    """Error of the first biomarker, or loss where none is measured."""
    errors = [value for name, value in row.items() if name.endswith("_error_mm2")]
    return float(errors[0] if errors else -(row["gain_db"] or 0.0))


def _methods(runs: Sequence[Run], edit: str) -> dict[str, dict[str, float]]:
    """Numbers of every row of an edit's table, means over the seeds."""
    by_row: dict[str, list[dict[str, float]]] = {}
    rules = {name: by_edit[edit] for name, by_edit in runs[0]["rules"].items() if edit in by_edit}
    for rule in RULES:
        if rule in rules:
            by_row[rule] = [rules[rule]]
    for run in runs:
        if edit in run["by_edit"]:
            by_row.setdefault(run["editor"], []).append(run["by_edit"][edit])
    if PERFECT in rules:
        by_row[PERFECT] = [rules[PERFECT]]
    return {name: mean_numbers(seeds) for name, seeds in by_row.items()}


def mean_numbers(seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the seeds that have a number."""
    keys = dict.fromkeys(key for numbers in seeds for key in numbers)
    return {key: float(np.mean([numbers[key] for numbers in seeds if key in numbers])) for key in keys}


def _of_follow_ups(run: Run) -> str:
    counts = run["counts"]
    text = (
        "The truth is the patient's later scan, whose grey levels are scaled so that both scans' windows agree; *same "
        "change for all* is the other patients' change a year, times the years."
    )
    elsewhere = counts["follow_ups"] - counts["raw_follow_ups"]
    if elsewhere:
        text += (
            f" {elsewhere} of {counts['follow_ups']} follow-ups have another grid or position than their baseline and "
            "are compared in the model's picture, not in raw pixels."
        )
    return text


def _table(methods: Mapping[str, Mapping[str, float]], biomarker: str, ceiling: float | None) -> list[str]:
    lines = []
    if ceiling is not None:
        lines += [
            f"By the causal model of a head of the template's shape, one scan tells who grows faster with an r of "
            f"{ceiling:.2f} at most; a patient's own shape, which the scan shows, can add to it.",
            "",
        ]
    titles = ["answer", "patients", "gain, dB"]
    if biomarker:
        titles += [f"r, {biomarker}", "growth, share of the true", "error, mm²", f"error over *{SAME}*"]
    lines += ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, numbers in methods.items():
        title = f"*{name}*" if name in (*RULES, PERFECT) else name
        lines.append("| " + " | ".join([title, *edit_cells(numbers, biomarker)]) + " |")
    return [*lines, ""]


def edit_cells(numbers: Mapping[str, float], biomarker: str) -> list[str]:
    """Patients, gain, and with a biomarker r, share of the true growth, error, and error over the rule's."""
    cells = [f"{numbers['cases']:.0f}", with_interval(numbers, "gain_db", "+.2f")]
    if not biomarker:
        return cells
    keys = {"r": ".2f", "growth_ratio": ".2f", "error_mm2": ".0f", "error_over_same": ".2f"}
    return cells + [with_interval(numbers, f"{biomarker}_{key}", shape) for key, shape in keys.items()]


def _single(runs: Sequence[Run], edit: str, biomarker: str) -> list[str]:
    """Each method's patients from worst to best, those in the middle left out where there are many."""
    key, unit = (f"{biomarker}_error_mm2", "error, mm²") if biomarker else ("gain_db", "gain, dB")
    lines = []
    for editor in dict.fromkeys(run["editor"] for run in runs):
        values: dict[str, list[float]] = {}
        for row in (row for run in runs if run["editor"] == editor for row in run["patients"]):
            if row["edit"] == edit and row.get(key) is not None:
                values.setdefault(row["patient"], []).append(row[key])
        means = {patient: float(np.mean(found)) for patient, found in values.items()}
        ranked = sorted(means, key=lambda patient: -means[patient] if biomarker else means[patient])
        shown = [f"{patient} {means[patient]:.{0 if biomarker else 1}f}" for patient in ranked]
        if len(shown) > WORST + BEST:
            shown[WORST:-BEST] = [f"(median {np.median(list(means.values())):.{0 if biomarker else 1}f})"]
        if shown:
            lines.append(f"- {editor}: {', '.join(shown)}")
    return [f"Single patients, {unit}, from worst to best:", "", *lines, ""] if lines else []


def with_interval(numbers: Mapping[str, float], key: str, shape: str) -> str:
    """A number as a table has it, with its interval if there is one; empty without a number."""
    if key not in numbers:
        return ""
    if f"{key}_low" not in numbers:
        return format(numbers[key], shape)
    value, low, high = (format(numbers[name], shape) for name in (key, f"{key}_low", f"{key}_high"))
    return f"{value} ({low} to {high})"
