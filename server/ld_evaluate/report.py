"""Tables of evaluation results in Markdown: mean and standard deviation over the seeds, a row for each method."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ld_common.core.atomic_files import write_bytes
from ld_evaluate.files import COPY, PAGE, PATIENTS, PUBLIC, RESULTS, SAME
from ld_evaluate.patient_tables import READING, Run, mean_numbers, patient_sections, patients_csv, with_interval
from ld_evaluate.public import public_evaluation

if TYPE_CHECKING:
    from ld_evaluate.edits import EvaluationEdit

TITLES = {
    "null_edit_psnr_gap_db": "null edit, dB below the VAE",
    "null_edits_psnr_gap_db": "repeated null edits, dB below the VAE",
    "reversal_psnr_db": "there and back, PSNR",
    "change": "change, share of white",
    "latent_divergence": "CLD",
    "identity_ratio": "identity",
    "copy_gain_db": "gain through the VAE, dB",
    "frechet": "FD",
    "kernel": "KD",
    "raw_gain_db": "gain, dB",
    "edit_direction_rate": "right direction",
    "growth_ratio": "growth, share of the true",
    "error_over_best_rule": "error of growth over the better rule's",
    "followup_raw_gain_db": "gain, follow-ups, dB",
    "followup_error_over_best_rule": "error of growth over the better rule's, follow-ups",
}
HEADLINE = {
    "raw_gain_db": "+.2f",
    "error_over_best_rule": ".2f",
    "followup_raw_gain_db": "+.2f",
    "followup_error_over_best_rule": ".2f",
}
"""With their formats."""
AXIOMS = ("null_edit_psnr_gap_db", "null_edits_psnr_gap_db", "reversal_psnr_db")
MINIMALITY = ("latent_divergence", "change", "identity_ratio", "copy_gain_db")
REALISM = ("frechet", "kernel")
TRUTH = "*the truth*"
"""Row of the true counterfactuals."""


def write_release_report(
    folder: Path, runs: Sequence[Run], name: str, data: Path, asked: Sequence[EvaluationEdit]
) -> list[Path]:
    """Write the page, the numbers, every patient's answers and what a release may publish; returns the files."""
    public = json.dumps(public_evaluation(runs[0], asked), indent=1, sort_keys=True)
    write_bytes(folder / PUBLIC, (public + "\n").encode())
    write_bytes(folder / RESULTS, (json.dumps({"runs": list(runs)}, indent=1, sort_keys=True) + "\n").encode())
    write_bytes(folder / PAGE, release_page(runs, name, data).encode())
    write_bytes(folder / PATIENTS, patients_csv(runs).encode())
    return [folder / RESULTS, folder / PAGE, folder / PATIENTS, folder / PUBLIC]


def release_page(runs: Sequence[Run], name: str, data: Path) -> str:
    """The Markdown page of one release on one set of scans."""
    counts = runs[0]["counts"]
    text = (
        f"{counts['questions']} edits of {counts['patients']} patients in `{data}`, {counts['follow_ups']} of whom "
        "have a follow-up."
    )
    if counts["reference_scans"]:
        text += f" Reference: {counts['reference_scans']} real scans of {counts['reference_patients']} other patients."
    text += f" `{PATIENTS}` has a row for each answer to each patient, the worst first."
    return "\n".join([f"# Evaluation of {name}", "", text, "", *sections(runs, {})])


def sections(runs: Sequence[Run], ceilings: Mapping[str, float]) -> list[str]:
    """All tables of one modality's runs.

    Args:
        runs: of one modality.
        ceilings: by edit, the highest r that a prediction from one scan can have; empty where no causal model tells.
    """
    real, metrics = runs[0]["real"], runs[0]["metrics"]
    lines: list[str] = []
    if runs[0]["by_edit"]:
        lines += [READING, "", *_headline(runs), "", *patient_sections(runs, ceilings)]
    else:
        lines += ["No follow-up and no true counterfactual is known: nothing says whether the answers are true.", ""]
    if composed := [run for run in runs if AXIOMS[0] in run["metrics"]]:
        lines += [
            "### Composition and reversibility",
            "",
            "Of the editors' own pictures, before they are written. A null edit asks for what the scan shows; its gaps "
            "are best at 0. *There and back* is the PSNR of all scans after each edit and its inverse, best when high.",
            "",
            *_table(composed, AXIOMS),
            "",
        ]
    lines += ["### Minimality", "", _minimality(metrics), "", *_table(runs, MINIMALITY), ""]
    if real:
        lines += ["### Effectiveness", "", *_effectiveness(runs, real), ""]
        lines += [
            "### Realism",
            "",
            "FD and KD are Fréchet and kernel distances between EfficientNet features of edited images and of real "
            f"scans of other patients; lower is better. As many real scans score {format_number(real['frechet'])} and "
            f"{format_number(real['kernel'])} against the rest. FD is biased upwards at these sample sizes, KD is not.",
            "",
            *_table(runs, REALISM),
            "",
        ]
    return lines


def _headline(runs: Sequence[Run]) -> list[str]:
    """Over all kinds of edit; the best rule is the better of *copy* and *same change for all*, for each kind."""
    metrics = [mean_numbers([run["metrics"] for run in runs if run["editor"] == editor]) for editor in _editors(runs)]
    keys = {key: shape for key, shape in HEADLINE.items() if any(key in numbers for numbers in metrics)}
    lines = [
        "### All edits",
        "",
        f"The error of growth is divided by that of the better rule for each kind of edit, *{COPY}* or *{SAME}*; below "
        "1 beats both.",
        "",
        *_header([TITLES[key] for key in keys]),
    ]
    for editor, numbers in zip(_editors(runs), metrics, strict=True):
        cells = [with_interval(numbers, key, shape) for key, shape in keys.items()]
        lines.append(f"| {editor} | " + " | ".join(cells) + " |")
    return lines


def _editors(runs: Sequence[Run]) -> list[str]:
    return editors_of(runs, runs[0]["modality"])


def _minimality(metrics: Mapping[str, float]) -> str:
    text = "*Change* is the mean absolute change of the picture; compare it with that of the truth, or between editors."
    if "latent_divergence" in metrics:
        text = (
            "*CLD* is Counterfactual Latent Divergence (arXiv 2403.19629), log(0.8 exp(p1) + 0.2 exp(p2)), in the "
            "latents of the VAE: p1 is the share of real scans with the attribute asked for that are no farther from "
            "the scan than the answer is, p2 the share of those with its own attribute that are no nearer. It lies "
            "between 0 and 1, lower is better; 0.295 is an answer nearer to the scan than every real scan, as a copy "
            f"is. Numbers count as the same within 5 % of their range. {text}"
        )
    if "identity_ratio" in metrics:
        text += (
            " *Identity* is the error of the editor's own picture outside the region that truly changes, over the "
            "VAE's own error there; 1 is best. The *gain through the VAE* leaves the way of writing out."
        )
    return text


def editors_of(runs: Sequence[Run], modality: str) -> list[str]:
    """Labels of the editors, in their order."""
    return list(dict.fromkeys(run["editor"] for run in runs if run["modality"] == modality))


def metric_values(runs: Sequence[Run], modality: str, editor: str, key: str) -> list[float]:
    """A metric of an editor, one value for each seed that has it."""
    metrics = [run["metrics"] for run in runs if run["modality"] == modality and run["editor"] == editor]
    return [values[key] for values in metrics if key in values]


def metric_mean(runs: Sequence[Run], modality: str, editor: str, key: str) -> float:
    """Mean of a metric over the seeds; NaN where no run has it."""
    values = metric_values(runs, modality, editor, key)
    return float(np.mean(values)) if values else float("nan")


def format_number(value: float) -> str:
    """A number in four digits, or whole where it is 1,000 or more."""
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _header(titles: Sequence[str]) -> list[str]:
    return ["| editor | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]


def _table(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    modality = runs[0]["modality"]
    keys = [key for key in keys if any(key in run["metrics"] for run in runs)]
    lines = _header([TITLES[key] for key in keys])
    for editor in editors_of(runs, modality):
        cells = [_cell(metric_values(runs, modality, editor, key)) for key in keys]
        lines.append(f"| {editor} | " + " | ".join(cells) + " |")
    return [*lines, *_truth_row(runs[0], keys)]


def _truth_row(run: Run, keys: Sequence[str], percent: Sequence[str] = ()) -> list[str]:
    """The true counterfactuals' own numbers, where they are known."""
    if not any(key in run["of_truth"] for key in keys):
        return []
    cells = [_cell([run["of_truth"][key]] if key in run["of_truth"] else [], key in percent) for key in keys]
    return [f"| {TRUTH} | " + " | ".join(cells) + " |"]


def _effectiveness(runs: Sequence[Run], real: Mapping[str, float]) -> list[str]:
    modality = runs[0]["modality"]
    keys = sorted({key for run in runs for key in run["metrics"] if key.endswith(("_moved", "_reached"))})
    reached = [key for key in keys if key.endswith("_reached")]
    titles = [
        f"{key.removesuffix('_reached')} reached"
        if key in reached
        else f"{key.removesuffix('_moved')}, share asked for"
        for key in keys
    ]
    lines = [
        "Networks trained on real scans read the attributes off the edited images; 1 and 100 % are asked for. Where "
        f"true counterfactuals are known, the row {TRUTH} has what the networks read off them.",
        "",
        *_header(titles),
    ]
    for editor in editors_of(runs, modality):
        cells = [_cell(metric_values(runs, modality, editor, key), key in reached) for key in keys]
        lines.append(f"| {editor} | " + " | ".join(cells) + " |")
    lines += _truth_row(runs[0], keys, reached)
    kinds = (("_error", "{} off by {:.1f} ({:.1f} by chance)"), ("_right", "{} right in {:.0%} ({:.0%} by chance)"))
    scores = [
        template.format(key.removesuffix(end), real[key], real[f"{key}_by_chance"])
        for end, template in kinds
        for key in sorted(real)
        if key.endswith(end)
    ]
    lines += ["", f"On the unedited scans these networks score: {', '.join(scores)}."]
    if blind := _at_chance(real, runs[0]["counts"]["patients"]):
        lines += ["", f"**No better than chance, so the column has no meaning: {', '.join(blind)}.**"]
    return lines


def _at_chance(real: Mapping[str, float], patients: int) -> list[str]:
    """Attributes whose networks do not beat the mean by a tenth, or the commonest category by two deviations."""
    names = []
    for key, chance in real.items():
        name, error, right = (key.removesuffix(f"{end}_by_chance") for end in ("", "_error", "_right"))
        if error != key and real[name] > 0.9 * chance:
            names.append(error)
        if right != key and real[name] < chance + 2 * (chance * (1 - chance) / patients) ** 0.5:
            names.append(right)
    return sorted(names)


def _cell(values: Sequence[float], percent: bool = False) -> str:
    if not values:
        return ""
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    if percent:
        return f"{mean:.0%}" + (f" ± {100 * spread:.0f}" if len(values) > 1 else "")
    return format_number(mean) + (f" ± {spread:.2g}" if len(values) > 1 else "")
