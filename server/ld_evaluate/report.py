"""Tables of evaluation results in Markdown: mean and standard deviation over the seeds, a row for each editor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ld_common.core.atomic_files import write_bytes

Run = dict[str, Any]
"""The result of one release asked through one editor with one seed."""
RESULTS, PAGE = "counterfactuals.json", "counterfactuals.md"
TITLES = {
    "null_edit_psnr_gap_db": "null edit, dB below the VAE",
    "null_edits_psnr_gap_db": "repeated null edits, dB below the VAE",
    "reversal_psnr_db": "there and back, PSNR",
    "change": "change, share of white",
    "identity_ratio": "identity",
    "frechet": "FD",
    "kernel": "KD",
    "edit_direction_rate": "right direction",
    "growth_ratio": "growth, share of the true",
    "growth_correlation": "growth correlation",
    "copy_gain_db": "gain over copying, dB",
    "followup_psnr_db": "PSNR",
    "followup_ssim": "SSIM",
    "followup_ms_ssim": "MS-SSIM",
}
AXIOMS = ("null_edit_psnr_gap_db", "null_edits_psnr_gap_db", "reversal_psnr_db", "change", "identity_ratio")
TRUTH = ("edit_direction_rate", "growth_ratio", "growth_correlation", "copy_gain_db", "frechet", "kernel")
FOLLOW_UP = ("psnr_db", "ssim", "ms_ssim")
PERCENT = ("edit_direction_rate",)
READING = (
    "Values are means ± standard deviations over the seeds. Every image that is compared passed the VAE, true "
    "counterfactuals and follow-ups included."
)


def write_release_report(folder: Path, runs: Sequence[Run], name: str, data: Path) -> list[Path]:
    """Write the page and the numbers of one release; returns the files."""
    write_bytes(folder / RESULTS, (json.dumps({"runs": list(runs)}, indent=1, sort_keys=True) + "\n").encode())
    write_bytes(folder / PAGE, release_page(runs, name, data).encode())
    return [folder / RESULTS, folder / PAGE]


def release_page(runs: Sequence[Run], name: str, data: Path) -> str:
    """The Markdown page of one release on one set of scans."""
    counts = runs[0]["counts"]
    text = (
        f"{counts['questions']} edits of {counts['patients']} patients in `{data}`, {counts['follow_ups']} of whom "
        "have a follow-up."
    )
    if counts["reference_scans"]:
        text += f" Reference: {counts['reference_scans']} real scans of {counts['reference_patients']} other patients."
    lines = [f"# Evaluation of {name}", "", f"{text} {READING}", ""]
    return "\n".join([*lines, *sections(runs, None)])


def sections(runs: Sequence[Run], ceiling: float | None) -> list[str]:
    """All tables of one modality's runs.

    Args:
        runs: of one modality.
        ceiling: growth correlation of the best prediction from one image; None where no causal model tells.
    """
    real, metrics = runs[0]["real"], runs[0]["metrics"]
    lines: list[str] = []
    if any(key in metrics for key in TRUTH):
        known = "copy_gain_db" in metrics
        title = "Against the true counterfactual, and realism" if known else "Realism"
        lines += [f"### {title}", ""]
        if known:
            lines += [
                "Higher is better for direction, correlation and gain; growth is best at 1. The gain is the PSNR "
                "against the true counterfactual minus that of the unedited scan, so 0 is no better than copying.",
                "",
            ]
        lines += [*_table(runs, TRUTH), ""]
    if ceiling is not None:
        lines += [
            f"No prediction from one image can have a growth correlation above {ceiling:.3f}, by the causal model.",
            "",
        ]
    if real:
        lines += [
            "FD and KD are Fréchet and kernel distances between EfficientNet features of edited images and of real "
            f"scans of other patients; lower is better. As many real scans score {format_number(real['frechet'])} and "
            f"{format_number(real['kernel'])} against the rest. FD is biased upwards at these sample sizes, KD is not.",
            "",
        ]
    lines += [
        "### Composition, reversibility, minimality",
        "",
        "The gaps are best at 0, the PSNR is best when high. *Change* has no best value: compare it between editors of "
        "the same gain.",
        "",
        *_table(runs, AXIOMS),
        "",
    ]
    if "identity_ratio" in metrics:
        lines += [
            "*Identity* is the error outside the region that truly changes, divided by the VAE's own error there; 1 is "
            "best.",
            "",
        ]
    if real:
        lines += ["### Effectiveness", "", *_effectiveness(runs, real), ""]
    if "copy_psnr_db" in metrics:
        lines += [
            "### Prediction of the follow-up",
            "",
            "A baseline is edited to the attributes of its follow-up and compared with it. An editor is of use where "
            "it beats the first row; the *error cut* is the share of that row's biomarker error that it removes.",
            "",
            *_follow_up(runs),
            "",
        ]
    if intervals := sorted(key.removesuffix("_low") for key in metrics if key.endswith("_low")):
        lines += [
            "### 95 % intervals over patients",
            "",
            "Bootstrap intervals for other patients of the same kind, averaged over the seeds; one that holds 0 is not "
            "distinguishable from copying the scan.",
            "",
            *_intervals(runs, intervals),
            "",
        ]
    if runs[0]["by_edit"]:
        lines += [
            "### Gain over copying by edit, dB",
            "",
            "PSNR against the true counterfactual minus that of the unedited scan, for each kind of edit; above 0 is "
            "nearer to the truth than the scan.",
            "",
            *_by_edit(runs),
            "",
        ]
    return lines


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
    modality, keys = runs[0]["modality"], [key for key in keys if key in runs[0]["metrics"]]
    lines = _header([TITLES[key] for key in keys])
    for editor in editors_of(runs, modality):
        cells = [_cell(metric_values(runs, modality, editor, key), key in PERCENT) for key in keys]
        lines.append(f"| {editor} | " + " | ".join(cells) + " |")
    return lines


def _effectiveness(runs: Sequence[Run], real: Mapping[str, float]) -> list[str]:
    modality = runs[0]["modality"]
    keys = sorted(key for key in runs[0]["metrics"] if key.endswith(("_moved", "_reached")))
    titles = [
        f"{key.removesuffix('_moved')}, share of the request"
        if key.endswith("_moved")
        else f"{key.removesuffix('_reached')} reached"
        for key in keys
    ]
    lines = [
        "Networks trained on real scans read the attributes off the edited images; 1 and 100 % are best.",
        "",
        *_header(titles),
    ]
    for editor in editors_of(runs, modality):
        cells = [_cell(metric_values(runs, modality, editor, key), key.endswith("_reached")) for key in keys]
        lines.append(f"| {editor} | " + " | ".join(cells) + " |")
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


def _follow_up(runs: Sequence[Run]) -> list[str]:
    modality, metrics = runs[0]["modality"], runs[0]["metrics"]
    sizes = sorted(key.removeprefix("copy_") for key in metrics if key.startswith("copy_") and "_error_mm2" in key)
    keys = [*FOLLOW_UP, *sizes]
    titles = [TITLES.get(f"followup_{key}", key.replace("_error_mm2", ", error in mm²")) for key in keys]
    cuts = sorted(key for key in metrics if key.endswith("_error_cut"))
    lines = _header([*titles, *("error cut" for _ in cuts)])
    copied = [format_number(float(np.mean([run["metrics"][f"copy_{key}"] for run in runs]))) for key in keys]
    lines.append("| *copying the baseline* | " + " | ".join([*copied, *("" for _ in cuts)]) + " |")
    for editor in editors_of(runs, modality):
        cells = [_cell(metric_values(runs, modality, editor, f"followup_{key}")) for key in keys]
        cells += [_cell(metric_values(runs, modality, editor, key), True) for key in cuts]
        lines.append(f"| {editor} | " + " | ".join(cells) + " |")
    return lines


def _intervals(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    modality = runs[0]["modality"]
    lines = _header([TITLES.get(key, key.removeprefix("followup_").replace("_", " ")) for key in keys])
    for editor in editors_of(runs, modality):
        ends = [[metric_mean(runs, modality, editor, f"{key}_{end}") for end in ("low", "high")] for key in keys]
        cells = " | ".join(f"{format_number(low)} to {format_number(high)}" for low, high in ends)
        lines.append(f"| {editor} | {cells} |")
    return lines


def _by_edit(runs: Sequence[Run]) -> list[str]:
    modality, edits = runs[0]["modality"], sorted({edit for run in runs for edit in run["by_edit"]})
    lines = _header([edit.replace("_", " ") for edit in edits])
    for editor in editors_of(runs, modality):
        means = [run["by_edit"] for run in runs if run["editor"] == editor]
        cells = [_cell([by_edit[edit]["copy_gain_db"] for by_edit in means if edit in by_edit]) for edit in edits]
        lines.append(f"| {editor} | " + " | ".join(cells) + " |")
    return lines


def _cell(values: Sequence[float], percent: bool = False) -> str:
    if not values:
        return ""
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    if percent:
        return f"{mean:.0%}" + (f" ± {100 * spread:.0f}" if len(values) > 1 else "")
    return format_number(mean) + (f" ± {spread:.2g}" if len(values) > 1 else "")
