"""The page of the counterfactuals benchmark: every editor over the seeds, and the numbers with an aim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ld_common.core.atomic_files import write_bytes
from ld_evaluate.comparison import r_over_ceiling
from ld_evaluate.files import PAGE, PATIENTS, RESULTS
from ld_evaluate.patient_tables import Run, patients_csv
from ld_evaluate.report import editors_of, metric_mean, sections
from ld_simulations.aims import Aim, aims_table
from ld_simulations.benchmarks.harness import json_bytes

JUDGED_BY = "raw_gain_db"
"""The metric that makes an editor the best one."""
AIMS = {
    "null_edit_psnr_gap_db": Aim("within 0.5 of the VAE", at_most=0.5),
    "raw_gain_db": Aim("at least 4 over copying", at_least=4),
    "error_over_best_rule": Aim("at most 0.8", at_most=0.8),
    "followup_error_over_best_rule": Aim("at most 0.8", at_most=0.8),
    "within_edit_r_over_ceiling": Aim("at least 0.8", at_least=0.8),
    "batch16_speedup": Aim("at least 3", at_least=3),
}
"""A number that a rule without a picture reaches is no aim; the errors are those of growth over the better rule's."""


def best_editor(runs: Sequence[Run]) -> tuple[str, str]:
    """The first modality, and the editor whose images are nearest to the truth in it."""
    modality = runs[0]["modality"]
    return modality, max(editors_of(runs, modality), key=lambda editor: metric_mean(runs, modality, editor, JUDGED_BY))


def summarize_table(
    runs: Sequence[Run], ceilings: Mapping[str, Mapping[str, float]], speedup: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The numbers with an aim, of the best editor in the first modality."""
    modality, best = best_editor(runs)

    def of_best(key: str) -> float:
        return metric_mean(runs, modality, best, key)

    of_editor = [run for run in runs if (run["modality"], run["editor"]) == (modality, best)]
    rates = [r_over_ceiling(run["biomarkers"][0], run["by_edit"], ceilings[modality]) for run in of_editor]
    return {
        "modality": modality,
        "editor": best,
        "seeds": len({run["seed"] for run in runs}),
        "null_edit_psnr_gap_db": of_best("null_edit_psnr_gap_db"),
        "raw_gain_db": of_best("raw_gain_db"),
        "error_over_best_rule": of_best("error_over_best_rule"),
        "followup_error_over_best_rule": of_best("followup_error_over_best_rule"),
        "within_edit_r_over_ceiling": float(np.mean(rates)),
        **({} if speedup is None else {"batch16_speedup": speedup["speedup"]}),
    }


def write_table(
    folder: Path,
    runs: Sequence[Run],
    planned: int,
    ceilings: Mapping[str, Mapping[str, float]],
    speedup: Mapping[str, Any] | None,
) -> list[Path]:
    """Write the page, its numbers and all answers, of so many results as were `planned` or fewer; returns the files."""
    summary = summarize_table(runs, ceilings, speedup)
    content = {"summary": summary, "ceilings": dict(ceilings), "batch": dict(speedup or {}), "runs": list(runs)}
    write_bytes(folder / RESULTS, json_bytes(content))
    write_bytes(folder / PAGE, page(runs, planned, summary, ceilings, speedup).encode())
    write_bytes(folder / PATIENTS, patients_csv(runs).encode())
    return [folder / RESULTS, folder / PAGE, folder / PATIENTS]


def page(
    runs: Sequence[Run],
    planned: int,
    summary: Mapping[str, Any],
    ceilings: Mapping[str, Mapping[str, float]],
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
        "Guidance scales and step counts were chosen on other patients (configs/benchmark_counterfactuals.yaml). "
        "Values are means ± standard deviations over the seeds. "
        f"`{PATIENTS}` has every answer to every patient.{missing}",
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
