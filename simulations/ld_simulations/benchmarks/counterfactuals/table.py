"""The page of the counterfactuals benchmark: every editor over the seeds, and the numbers with an aim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ld_common.core.atomic_files import write_bytes
from ld_evaluate.report import PAGE, READING, RESULTS, Run, editors_of, metric_mean, sections
from ld_simulations.aims import Aim, aims_table
from ld_simulations.benchmarks.harness import json_bytes

JUDGED_BY = "copy_gain_db"
"""The metric that makes an editor the best one."""
AIMS = {
    "null_edit_psnr_gap_db": Aim("within 0.5 of the VAE", at_most=0.5),
    "followup_ventricle_error_cut": Aim("at least 0.2", at_least=0.2),
    "edit_direction_rate": Aim("at least 0.98", at_least=0.98),
    "copy_gain_db": Aim("at least 4", at_least=4),
    "growth_correlation_of_ceiling": Aim("at least 0.9", at_least=0.9),
    "batch16_speedup": Aim("at least 3", at_least=3),
}


def best_editor(runs: Sequence[Run]) -> tuple[str, str]:
    """The first modality, and the editor whose images are nearest to the truth in it."""
    modality = runs[0]["modality"]
    return modality, max(editors_of(runs, modality), key=lambda editor: metric_mean(runs, modality, editor, JUDGED_BY))


def summarize_table(
    runs: Sequence[Run], ceilings: Mapping[str, float], speedup: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The numbers with an aim, of the best editor in the first modality."""
    modality, best = best_editor(runs)

    def of_best(key: str) -> float:
        return metric_mean(runs, modality, best, key)

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
        **({} if speedup is None else {"batch16_speedup": speedup["speedup"]}),
    }


def write_table(
    folder: Path,
    runs: Sequence[Run],
    planned: int,
    ceilings: Mapping[str, float],
    speedup: Mapping[str, Any] | None,
) -> list[Path]:
    """Write the page and its numbers, of so many results as were `planned` or fewer; returns the files."""
    summary = summarize_table(runs, ceilings, speedup)
    content = {"summary": summary, "ceilings": dict(ceilings), "batch": dict(speedup or {}), "runs": list(runs)}
    write_bytes(folder / RESULTS, json_bytes(content, sort_keys=True))
    write_bytes(folder / PAGE, page(runs, planned, summary, ceilings, speedup).encode())
    return [folder / RESULTS, folder / PAGE]


def page(
    runs: Sequence[Run],
    planned: int,
    summary: Mapping[str, Any],
    ceilings: Mapping[str, float],
    speedup: Mapping[str, Any] | None,
) -> str:
    """The Markdown page of the whole table."""
    seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))
    missing = "" if len(runs) == planned else f" **{len(runs)} of {planned} planned results are there yet.**"
    lines = [
        "# Counterfactuals against the truth",
        "",
        "Written by `make benchmark-counterfactuals`. Releases of the demos' federations (the same sites, rounds and "
        f"averages, without Flower) with seeds {seeds} edit scans of simulated patients that none was trained on. "
        "Guidance scales and step counts were chosen on these same patients, with some of the seeds. "
        f"{READING}{missing}",
        "",
        f"The best editor in the {summary['modality']}, by its gain over copying the scan, is "
        f"**{summary['editor']}**. Its numbers beside their aims:",
        "",
        aims_table(summary, {key: aim for key, aim in AIMS.items() if key in summary}),
    ]
    if speedup is not None:
        size = speedup["batch"]
        turns = ", ".join(f"{turn['1']:.1f} s against {turn[str(size)]:.1f} s" for turn in speedup["turns"])
        lines += [f"Time of {size} edits one by one against together, on {speedup['threads']} threads: {turns}.", ""]
    for modality in dict.fromkeys(run["modality"] for run in runs):
        lines += [f"## {modality.title()}", ""]
        lines += sections([run for run in runs if run["modality"] == modality], ceilings[modality])
    return "\n".join(lines)
