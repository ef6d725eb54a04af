"""The page of the benchmark of individual answers: tables by question, and every patient as a point."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ld_evaluate.bootstrap import bootstrap_interval
from ld_simulations.benchmarks.individual.answers import (
    ATTRIBUTES,
    COPY,
    CROSS,
    DRIFT,
    DRIFT_HISTORY,
    LINE,
    LONG,
    OWN,
    PERFECT,
    PERFECT_DECODED,
    RELEASE,
    RULES,
    SAME,
    Choice,
    Record,
)
from ld_simulations.benchmarks.individual.people import FOLLOW_UP
from ld_simulations.benchmarks.individual.trajectories import CURVE, band_numbers, curve_numbers

ROWS = (
    COPY,
    SAME,
    ATTRIBUTES,
    CROSS,
    LONG,
    OWN,
    LINE,
    DRIFT,
    DRIFT_HISTORY,
    RELEASE,
    f"{RELEASE}, decoded",
    PERFECT,
    PERFECT_DECODED,
)
EDITS = ("age_plus_10", "age_plus_20", "disease_added", "disease_removed", "other_sex")
HISTORIES = ("history_5", "history_10")
GROWING = (*CURVE, "disease_added", "disease_removed", *HISTORIES, FOLLOW_UP)
PLOTTED = ("age_plus_10", "age_plus_20", "history_5")
RESAMPLES = 1000


def with_same_change(records: Sequence[Record], mean_growth: Mapping[str, float]) -> list[Record]:
    """The records with the row *same change for all*: each question's mean true growth over the tuning patients.

    That of a follow-up is a year's, times the years.
    """
    asked = {(record["patient"], record["question"]): record for record in records}.values()
    same = []
    for record in asked:
        growth = mean_growth.get(record["question"])
        if growth is not None:
            years = record["years"] if record["question"] == FOLLOW_UP else 1.0
            same.append(record | {"row": SAME, "gain_db": None, "growth_mm2": years * growth})
    return [*records, *same]


def summarize(records: Sequence[Record], row: str, question: str) -> dict[str, Any] | None:
    """Numbers of a row for one question over patients, with 95 % intervals; None without answers."""
    of_row = [record for record in records if (record["row"], record["question"]) == (row, question)]
    if not of_row:
        return None
    asked = {record["patient"] for record in of_row}
    same = [record for record in records if (record["row"], record["question"]) == (SAME, question)]
    patients = np.array([record["patient"] for record in of_row])
    drawn, true = (np.array([record[key] for record in of_row]) for key in ("growth_mm2", "true_growth_mm2"))
    errors = np.abs(drawn - true)
    numbers: dict[str, Any] = {"patients": len(of_row), "error_mm2": float(errors.mean())}
    if of_row[0]["gain_db"] is not None:
        gains = np.array([record["gain_db"] for record in of_row])
        numbers["raw_gain_db"] = float(gains.mean())
        numbers |= bootstrap_interval("raw_gain_db", patients, gains)
    if question not in GROWING:
        return numbers
    numbers["growth_ratio"] = float(drawn.mean() / true.mean())
    if np.ptp(drawn) > 0 and len(of_row) > 2:
        numbers |= _correlation(drawn, true)
    by_patient = {record["patient"]: abs(record["growth_mm2"] - record["true_growth_mm2"]) for record in same}
    if asked <= set(by_patient):
        others = np.array([by_patient[name] for name in patients])
        numbers["error_over_same_for_all"] = float(errors.sum() / others.sum())
        numbers |= bootstrap_interval("error_over_same_for_all", patients, errors, others)
    return numbers


def anatomy_lines(
    records: Sequence[Record], choice: Choice, ceilings: Mapping[str, float], title: str, terms: str
) -> list[str]:
    """The section of an anatomy."""
    scales = ", ".join(f"{kind} {scale:g}" for kind, scale in choice.scales.items())
    options = ", ".join(f"{name} {value:g}" for name, value in choice.drift.items())
    lines = [
        f"## {title}",
        "",
        f"Chosen on the tuning patients: the ridges with {choice.components} components, `{choice.rendering}`, change "
        f"× {scales}; own history: {choice.own[1]:.0%} of the own slope and the rest of the ridge × {choice.own[0]:g}; "
        f"editor drift: `{choice.drift_rendering}`, {options}.",
        "",
    ]
    for question in sorted({record["question"] for record in records}, key=_place):
        ceiling = ceilings.get(question)
        lines += [f"### {question.replace('_', ' ').capitalize()}", ""]
        if ceiling is not None:
            lines += [
                f"Growth of the {terms}. In anatomies of the template's shape, one scan tells who grows faster with an "
                f"r of {ceiling:.2f} at most; a patient's own shape, which the scan shows, can add to it.",
                "",
            ]
        lines += [
            "| answer | patients | gain in raw pixels, dB | r within the edit | growth, share of the true | error, mm² "
            "| error over *same change for all* |",
            "|---" * 7 + "|",
        ]
        for row in ROWS:
            numbers = summarize(records, row, question)
            if numbers is not None:
                lines.append(_table_row(row, numbers))
        lines.append("")
    return lines


def numbers_by_question(records: Sequence[Record]) -> dict[str, dict[str, dict[str, Any]]]:
    """What the tables show: by question and row."""
    questions = sorted({record["question"] for record in records}, key=_place)
    found = {question: {row: summarize(records, row, question) for row in ROWS} for question in questions}
    return {
        question: {row: numbers for row, numbers in rows.items() if numbers is not None}
        for question, rows in found.items()
    }


def flat_numbers(records: Sequence[Record]) -> dict[str, Any]:
    """The keys of the aims, of editor `drift`; other rows have the same keys with their name behind."""
    numbers: dict[str, Any] = {}
    for row in (DRIFT, CROSS, LONG, RELEASE, f"{RELEASE}, decoded", PERFECT, PERFECT_DECODED):
        suffix = "" if row == DRIFT else f"_{_key(row)}"
        means = [summarize(records, row, question) for question in EDITS]
        gains = [mean["raw_gain_db"] for mean in means if mean is not None]
        if gains:
            numbers[f"raw_gain_db{suffix}"] = float(np.mean(gains))
        aged = [summarize(records, row, question) for question in ("age_plus_10", "age_plus_20")]
        correlations = [mean["r"] for mean in aged if mean is not None and "r" in mean]
        if correlations:
            numbers[f"within_edit_r_one_scan{suffix}"] = float(np.mean(correlations))
    rules = [numbers[key] for key in (f"raw_gain_db_{_key(rule)}" for rule in RULES) if key in numbers]
    if rules and "raw_gain_db" in numbers:
        numbers["raw_gain_over_best_rule_db"] = numbers["raw_gain_db"] - max(rules)
    return numbers | _of_editor(records)


def _of_editor(records: Sequence[Record]) -> dict[str, Any]:
    """Numbers that only editor `drift` has."""
    numbers: dict[str, Any] = {}
    by_edit = {edit: summarize(records, DRIFT, edit) for edit in (*EDITS[:4], FOLLOW_UP)}
    for edit, values in by_edit.items():
        if values is not None:
            numbers[f"growth_ratio_{edit}"] = values["growth_ratio"]
            if "error_over_same_for_all" in values:
                numbers[f"growth_error_over_same_for_all_{edit}"] = values["error_over_same_for_all"]
    ratios = [numbers.get(f"growth_error_over_same_for_all_{edit}") for edit in EDITS[:4]]
    known = [ratio for ratio in ratios if ratio is not None]
    if known:
        numbers["growth_error_over_same_for_all_one_scan"] = max(known)
    if f"growth_error_over_same_for_all_{FOLLOW_UP}" in numbers:
        numbers["followup_error_over_same_for_all"] = numbers[f"growth_error_over_same_for_all_{FOLLOW_UP}"]
    with_history = [summarize(records, DRIFT_HISTORY, question) for question in HISTORIES]
    for key, name in (
        ("raw_gain_db", "raw_gain_history_db"),
        ("r", "within_edit_r_history_3"),
        ("error_over_same_for_all", "growth_error_over_same_for_all_history_3"),
    ):
        means = [mean[key] for mean in with_history if mean is not None and key in mean]
        if means:
            numbers[name] = float(np.mean(means))
    return numbers | curve_numbers(records) | band_numbers(records)


def patients_picture(records: Sequence[Record], title: str) -> bytes:
    """Drawn against true growth, a point a patient, for some questions and rows."""
    rows = [row for row in (DRIFT, DRIFT_HISTORY, LONG) if any(record["row"] == row for record in records)]
    figure = Figure(figsize=(3.1 * len(PLOTTED), 3.0 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(PLOTTED), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for place, question in zip(line, PLOTTED, strict=True):
            of_row = [record for record in records if (record["row"], record["question"]) == (row, question)]
            if not of_row:
                place.axis("off")
                continue
            drawn, true = (np.array([record[key] for record in of_row]) for key in ("growth_mm2", "true_growth_mm2"))
            ends = [min(0.0, true.min(), drawn.min()), max(true.max(), drawn.max())]
            place.plot(ends, ends, color="0.6", lw=0.8)
            place.axhline(true.mean(), color="0.6", lw=0.8, ls=":")
            place.scatter(true, drawn, s=7, alpha=0.6, linewidths=0)
            place.set_title(f"{row}, {question.replace('_', ' ')}", fontsize=8)
            place.set_xlabel("true growth, mm²", fontsize=7)
            place.set_ylabel("drawn growth, mm²", fontsize=7)
            place.tick_params(labelsize=6)
    figure.suptitle(f"{title}: a point a test patient; dotted, their mean", fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=90)
    return stream.getvalue()


def _place(question: str) -> int:
    return GROWING.index(question) if question in GROWING else len(GROWING)


def _table_row(row: str, numbers: Mapping[str, Any]) -> str:
    cells = [
        _with_interval(numbers, "raw_gain_db", "+.2f"),
        _with_interval(numbers, "r", ".2f"),
        f"{numbers['growth_ratio']:.2f}" if "growth_ratio" in numbers else "",
        f"{numbers['error_mm2']:.0f}",
        _with_interval(numbers, "error_over_same_for_all", ".2f"),
    ]
    return f"| {row} | {numbers['patients']} | {' | '.join(cells)} |"


def _with_interval(numbers: Mapping[str, Any], key: str, shape: str) -> str:
    if key not in numbers:
        return ""
    value, low, high = (format(numbers[name], shape) for name in (key, f"{key}_low", f"{key}_high"))
    return f"{value} ({low} to {high})"


def _correlation(drawn: np.ndarray, true: np.ndarray) -> dict[str, float]:
    rows = np.random.default_rng(0).integers(0, len(drawn), (RESAMPLES, len(drawn)))
    one, other = (values[rows] - values[rows].mean(1, keepdims=True) for values in (drawn, true))
    varies = (np.ptp(one, axis=1) > 0) & (np.ptp(other, axis=1) > 0)
    one, other = one[varies], other[varies]
    found = (one * other).sum(1) / np.sqrt((one**2).sum(1) * (other**2).sum(1))
    low, high = np.quantile(found, (0.025, 0.975))
    return {"r": float(np.corrcoef(drawn, true)[0, 1]), "r_low": float(low), "r_high": float(high)}


def _key(row: str) -> str:
    return row.replace(",", "").replace("-", "_").replace(" ", "_")
