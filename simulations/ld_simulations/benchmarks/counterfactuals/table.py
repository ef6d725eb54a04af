"""The table of counterfactuals: every way of asking, mean and deviation over the seeds, and the numbers with an aim."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ld_common.core.atomic_files import write_bytes
from ld_simulations.benchmarks.counterfactuals.execution import Run
from ld_simulations.summary import Aim, as_markdown, shown

RESULTS, PAGE = "counterfactuals.json", "counterfactuals.md"
JUDGED_BY = "copy_gain_db"
"""What makes a editor the best one."""
TITLES = {
    "null_edit_psnr_gap_db": "null edit, dB below the VAE",
    "null_edits_psnr_gap_db": "one after the other",
    "reversal_psnr_db": "there and back, PSNR",
    "change": "change, share of white",
    "identity_ratio": "identity",
    "frechet": "FD",
    "kernel": "KD",
    "edit_direction_rate": "right direction",
    "growth_ratio": "growth, share of the true",
    "growth_correlation": "growth correlation",
    "copy_gain_db": "nearer to the truth, dB",
    "followup_psnr_db": "PSNR",
    "followup_ssim": "SSIM",
    "followup_ms_ssim": "MS-SSIM",
}
AXIOMS = ("null_edit_psnr_gap_db", "null_edits_psnr_gap_db", "reversal_psnr_db", "change", "identity_ratio")
TRUTH = ("edit_direction_rate", "growth_ratio", "growth_correlation", "copy_gain_db", "frechet", "kernel")
FOLLOW_UP = ("psnr_db", "ssim", "ms_ssim")
PERCENT = ("edit_direction_rate",)
READING = (
    "Mean ± standard deviation over the seeds. Every picture that is compared went through the VAE, truth and "
    "follow-up too."
)


AIMS = {
    "null_edit_psnr_gap_db": Aim("within 0.5 of the VAE", at_most=0.5),
    "followup_ventricle_error_cut": Aim("at least 0.2", at_least=0.2),
    "edit_direction_rate": Aim("at least 0.98", at_least=0.98),
    "copy_gain_db": Aim("at least 4", at_least=4),
    "growth_correlation_of_ceiling": Aim("at least 0.9", at_least=0.9),
    "batch16_speedup": Aim("at least 3", at_least=3),
}


def best_editor(runs: Sequence[Run]) -> tuple[str, str]:
    """The first modality, and the way of asking that comes nearest to the truth in it."""
    modality = runs[0]["modality"]
    return modality, max(editors_of(runs, modality), key=lambda editor: _mean(runs, modality, editor, JUDGED_BY))


def summarize_table(runs: Sequence[Run], ceilings: Mapping[str, float], speedup: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers with an aim, of the best editor in the first modality."""
    modality, best = best_editor(runs)

    def of_best(key: str) -> float:
        return _mean(runs, modality, best, key)

    cut = next((key for key in runs[0]["metrics"] if key.endswith("_error_cut")), "")
    return {
        "modality": modality,
        "editor": best,
        "seeds": len({run["seed"] for run in runs}),
        "null_edit_psnr_gap_db": of_best("null_edit_psnr_gap_db"),
        "followup_ventricle_error_cut": of_best(cut),
        "edit_direction_rate": of_best("edit_direction_rate"),
        "copy_gain_db": of_best("copy_gain_db"),
        "growth_correlation_of_ceiling": of_best("growth_correlation") / ceilings[modality],
        "batch16_speedup": speedup["speedup"],
    }


def write_table(
    folder: Path, runs: Sequence[Run], planned: int, ceilings: Mapping[str, float], speedup: Mapping[str, Any]
) -> Path:
    """Write the page and its numbers, of so many results as were `planned` or fewer; returns the page."""
    summary = summarize_table(runs, ceilings, speedup)
    content = {"summary": summary, "ceilings": dict(ceilings), "batch": dict(speedup), "runs": list(runs)}
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / RESULTS, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
    write_bytes(folder / PAGE, page(runs, planned, summary, ceilings, speedup).encode())
    return folder / PAGE


def write_release_table(folder: Path, runs: Sequence[Run], name: str, data: Path) -> list[Path]:
    """Write the page and the numbers of one release; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / RESULTS, (json.dumps({"runs": list(runs)}, indent=1, sort_keys=True) + "\n").encode())
    write_bytes(folder / PAGE, release_page(runs, name, data).encode())
    return [folder / RESULTS, folder / PAGE]


def editors_of(runs: Sequence[Run], modality: str) -> list[str]:
    """The ways of asking in their order."""
    return list(dict.fromkeys(run["editor"] for run in runs if run["modality"] == modality))


def page(
    runs: Sequence[Run],
    planned: int,
    summary: Mapping[str, Any],
    ceilings: Mapping[str, float],
    speedup: Mapping[str, Any],
) -> str:
    """The Markdown page of the whole table."""
    seeds = sorted({run["seed"] for run in runs})
    missing = "" if len(runs) == planned else f" **{len(runs)} of {planned} planned results are there yet.**"
    lines = [
        "# Are the counterfactuals true?",
        "",
        "`make benchmark-counterfactuals` wrote this page: releases of the demos' federations (the same sites, rounds "
        f"and averages, without Flower), seeds {', '.join(map(str, seeds))}, asked in each way about rendered patients "
        "whom none was trained on; strengths and steps were chosen on these same patients, with some of the seeds. "
        f"{READING}{missing}",
        "",
        f"Of the editor that comes nearest to the truth in the {summary['modality']}, **{summary['editor']}**:",
        "",
        as_markdown(summary, AIMS),
    ]
    size = speedup["batch"]
    turns = ", ".join(f"{turn['1']:.1f} s against {turn[str(size)]:.1f} s" for turn in speedup["turns"])
    lines += [f"{size} edits one by one against together, on {speedup['threads']} threads: {turns}.", ""]
    for modality in dict.fromkeys(run["modality"] for run in runs):
        lines += [f"## {modality.title()}", ""]
        lines += _section([run for run in runs if run["modality"] == modality], ceilings[modality])
    return "\n".join(lines)


def release_page(runs: Sequence[Run], name: str, data: Path) -> str:
    """The Markdown page of one release on one set of scans."""
    counts = runs[0]["counts"]
    asked = (
        f"Asked {counts['questions']} questions about {counts['patients']} patients in `{data}`, "
        f"{counts['follow_ups']} of whom have a follow-up."
    )
    if counts["reference_scans"]:
        asked += f" Real scans to compare with: {counts['reference_scans']}, of {counts['reference_patients']} others."
    lines = [f"# Are the counterfactuals of {name} true?", "", f"{asked} {READING}", ""]
    return "\n".join([*lines, *_section(runs, None)])


def _section(runs: Sequence[Run], ceiling: float | None) -> list[str]:
    real, metrics = runs[0]["real"], runs[0]["metrics"]
    lines: list[str] = []
    if any(key in metrics for key in TRUTH):
        known = "copy_gain_db" in metrics
        title = "Against the true counterfactual, and realism" if known else "Realism"
        lines += [f"### {title}", "", *_table(runs, TRUTH), ""]
    if ceiling is not None:
        lines += [f"The growth correlation's ceiling, from the causal model, is {ceiling:.3f}.", ""]
    if real:
        lines += [
            "FD and KD: Fréchet and kernel distance of EfficientNet features from real scans of other patients; as "
            f"many of those score {shown(real['frechet'])} and {shown(real['kernel'])} against their rest. FD is "
            "biased upwards at these numbers, KD is not.",
            "",
        ]
    lines += ["### Composition, reversibility, minimality", "", *_table(runs, AXIOMS), ""]
    if "identity_ratio" in metrics:
        lines += ["*Identity*: error outside the region that truly changes over the VAE's own, 1 at best.", ""]
    if real:
        lines += ["### Effectiveness", "", *_effectiveness(runs, real), ""]
    if "copy_psnr_db" in metrics:
        lines += ["### A baseline edited to its follow-up", "", *_follow_up(runs), ""]
    if intervals := sorted(key.removesuffix("_low") for key in metrics if key.endswith("_low")):
        lines += ["### How sure, with so many patients", "", *_intervals(runs, intervals), ""]
    if runs[0]["by_edit"]:
        lines += ["### Nearer to the true counterfactual than the scan by, dB", "", *_by_edit(runs), ""]
    return lines


def _table(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    modality, keys = runs[0]["modality"], [key for key in keys if key in runs[0]["metrics"]]
    lines = ["| editor | " + " | ".join(TITLES[key] for key in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for editor in editors_of(runs, modality):
        cells = [_cell(_values(runs, modality, editor, key), key in PERCENT) for key in keys]
        lines.append(f"| {editor} | " + " | ".join(cells) + " |")
    return lines


def _effectiveness(runs: Sequence[Run], real: Mapping[str, float]) -> list[str]:
    keys = sorted(key for key in runs[0]["metrics"] if key.endswith(("_moved", "_reached")))
    titles = [
        f"{key.removesuffix('_moved')}, share of what was asked"
        if key.endswith("_moved")
        else f"{key.removesuffix('_reached')} reached"
        for key in keys
    ]
    lines = ["| editor | " + " | ".join(titles) + " |", "|---" * (len(keys) + 1) + "|"]
    modality = runs[0]["modality"]
    for editor in editors_of(runs, modality):
        cells = [_cell(_values(runs, modality, editor, key), key.endswith("_reached")) for key in keys]
        lines.append(f"| {editor} | " + " | ".join(cells) + " |")
    kinds = (("_error", "{} off by {:.1f} ({:.1f} by chance)"), ("_right", "{} right in {:.0%} ({:.0%} by chance)"))
    said = [
        words.format(key.removesuffix(end), real[key], real[f"{key}_by_chance"])
        for end, words in kinds
        for key in sorted(real)
        if key.endswith(end)
    ]
    learned = "Read off by networks that learned from real scans"
    lines += ["", f"{learned}; on the unedited scans: {', '.join(said)}."]
    if blind := _blind(real, runs[0]["counts"]["patients"]):
        lines += ["", f"**No better than chance, so that nothing is read off: {', '.join(blind)}.**"]
    return lines


def _blind(real: Mapping[str, float], patients: int) -> list[str]:
    """Attributes whose networks do not beat saying the mean by a tenth, or the commonest word by two deviations."""
    found = []
    for key, chance in real.items():
        name, error, right = (key.removesuffix(f"{end}_by_chance") for end in ("", "_error", "_right"))
        if error != key and real[name] > 0.9 * chance:
            found.append(error)
        if right != key and real[name] < chance + 2 * (chance * (1 - chance) / patients) ** 0.5:
            found.append(right)
    return sorted(found)


def _follow_up(runs: Sequence[Run]) -> list[str]:
    modality, metrics = runs[0]["modality"], runs[0]["metrics"]
    sizes = sorted(key.removeprefix("copy_") for key in metrics if key.startswith("copy_") and "_error_mm2" in key)
    keys = [*FOLLOW_UP, *sizes]
    titles = [TITLES.get(f"followup_{key}", key.replace("_error_mm2", ", error in mm²")) for key in keys]
    cuts = sorted(key for key in metrics if key.endswith("_error_cut"))
    lines = ["| editor | " + " | ".join([*titles, *("error cut" for _ in cuts)]) + " |"]
    lines.append("|---" * (len(keys) + len(cuts) + 1) + "|")
    copied = [shown(float(np.mean([run["metrics"][f"copy_{key}"] for run in runs]))) for key in keys]
    lines.append("| *copying the baseline* | " + " | ".join([*copied, *("" for _ in cuts)]) + " |")
    for editor in editors_of(runs, modality):
        cells = [_cell(_values(runs, modality, editor, f"followup_{key}")) for key in keys]
        cells += [_cell(_values(runs, modality, editor, key), True) for key in cuts]
        lines.append(f"| {editor} | " + " | ".join(cells) + " |")
    return lines


def _intervals(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    modality = runs[0]["modality"]
    titles = [TITLES.get(key, key.removeprefix("followup_").replace("_", " ")) for key in keys]
    lines = ["| editor | " + " | ".join(titles) + " |", "|---" * (len(keys) + 1) + "|"]
    for editor in editors_of(runs, modality):
        ends = [[_mean(runs, modality, editor, f"{key}_{end}") for end in ("low", "high")] for key in keys]
        lines.append(f"| {editor} | " + " | ".join(f"{shown(low)} to {shown(high)}" for low, high in ends) + " |")
    return [*lines, "", "95 % intervals, by drawing other patients from these (bootstrap); their mean over the seeds."]


def _by_edit(runs: Sequence[Run]) -> list[str]:
    modality, edits = runs[0]["modality"], sorted({edit for run in runs for edit in run["by_edit"]})
    lines = ["| editor | " + " | ".join(edit.replace("_", " ") for edit in edits) + " |"]
    lines.append("|---" * (len(edits) + 1) + "|")
    for editor in editors_of(runs, modality):
        own = [run["by_edit"] for run in runs if run["editor"] == editor]
        cells = [_cell([one[edit]["copy_gain_db"] for one in own if edit in one]) for edit in edits]
        lines.append(f"| {editor} | " + " | ".join(cells) + " |")
    return lines


def _values(runs: Sequence[Run], modality: str, editor: str, key: str) -> list[float]:
    own = [run["metrics"] for run in runs if run["modality"] == modality and run["editor"] == editor]
    return [one[key] for one in own if key in one]


def _mean(runs: Sequence[Run], modality: str, editor: str, key: str) -> float:
    values = _values(runs, modality, editor, key)
    return float(np.mean(values)) if values else float("nan")


def _cell(values: Sequence[float], percent: bool = False) -> str:
    if not values:
        return ""
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    if percent:
        return f"{mean:.0%}" + (f" ± {100 * spread:.0f}" if len(values) > 1 else "")
    return shown(mean) + (f" ± {spread:.2g}" if len(values) > 1 else "")
