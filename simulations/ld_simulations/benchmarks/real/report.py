"""The page and the numbers of the benchmark on real scans; pictures of patients are not among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ld_evaluate.bootstrap import bootstrap_interval
from ld_evaluate.files import COPY, PERFECT
from ld_simulations.benchmarks.real.radiographs import BLEND, DRIFT, DRIFT_HISTORY, MEAN, ROWS, VAE

Rows = Mapping[str, Sequence[Mapping[str, Any]]]
"""Follow-ups by rule, each with `patient`, `days` and `gain_db`."""
WITHOUT_CHANGE = (COPY, VAE, MEAN, BLEND)
"""Rules that know no change; italic in the table, as *perfect answer* is."""
SOURCES = (
    "Radiographs: COVID-19 Image Repository, Institute for Diagnostic and Interventional Radiology, Hannover Medical "
    "School, 2020/21, doi 10.25835/0090041, CC BY 3.0. Brain MRI: Lesjak et al., Neuroinformatics 2016, CC BY. "
    "MeshNet: neuroneural/brainchop, MIT licence."
)


def numbers_of(rows: Rows) -> dict[str, dict[str, float]]:
    """Of each rule: mean gain with a 95 % interval over patients, and the share of follow-ups nearer than a copy."""
    numbers = {}
    for name in ROWS:
        patients = np.array([row["patient"] for row in rows[name]])
        gains = np.array([float(row["gain_db"]) for row in rows[name]])
        numbers[name] = {
            "gain_db": float(gains.mean()),
            **bootstrap_interval("gain_db", patients, gains),
            "nearer_than_copy": float((gains > 0).mean()),
            "worst_patient_db": min(float(gains[patients == patient].mean()) for patient in set(patients)),
            "best_patient_db": max(float(gains[patients == patient].mean()) for patient in set(patients)),
        }
    return numbers


def over_db(rows: Rows, name: str, other: str) -> dict[str, float]:
    """How much nearer one rule is than another, dB, with a 95 % interval over patients."""
    gains = np.array([float(a["gain_db"]) - float(b["gain_db"]) for a, b in zip(rows[name], rows[other], strict=True)])
    patients = np.array([row["patient"] for row in rows[name]])
    return {"gain_db": float(gains.mean()), **bootstrap_interval("gain_db", patients, gains)}


def lines_of(title: str, text: str, rows: Rows) -> list[str]:
    """A section on one set of follow-ups."""
    first = rows[COPY]
    days = [row["days"] for row in first]
    numbers = numbers_of(rows)
    lines = [
        f"## {title}",
        "",
        f"{text} {len(first)} follow-ups of {len({row['patient'] for row in first})} patients, {min(days):.0f} to "
        f"{max(days):.0f} days after the visit that is edited (median {np.median(days):.0f}).",
        "",
        "| answer | gain over the unedited scan, dB | nearer than a copy | worst patient, dB | best patient, dB |",
        "|---" * 5 + "|",
    ]
    for name, of in numbers.items():
        shown = f"*{name}*" if name in (*WITHOUT_CHANGE, PERFECT) else name
        lines.append(
            f"| {shown} | {_interval(of)} | {of['nearer_than_copy']:.0%} | {of['worst_patient_db']:+.2f} | "
            f"{of['best_patient_db']:+.2f} |"
        )
    rivals = {name: numbers[name]["gain_db"] for name in (*WITHOUT_CHANGE,)}
    rival = max(rivals, key=lambda name: rivals[name])
    lines += [
        "",
        f"Over the best rule that knows no change, *{rival}*: {DRIFT} {_interval(over_db(rows, DRIFT, rival))} dB, "
        f"{DRIFT_HISTORY} {_interval(over_db(rows, DRIFT_HISTORY, rival))} dB.",
        "",
    ]
    return lines


def brain_lines(brains: Sequence[Mapping[str, Any]]) -> list[str]:
    """The section on two visits of real brains."""
    lines = [
        "## Ventricles of two brains by an independent judge",
        "",
        "A MeshNet, trained on other data by others, segments both visits of two patients with multiple sclerosis and "
        "strips the skull; this project's measure then sees the slice that the brain modality takes. *Copy* is how "
        "alike both visits' slices are, *VAE* how well the second one passes the base's autoencoder: an answer can "
        "show a change only if it is larger than what the VAE loses.",
        "",
        "| patient | days | lateral ventricles by MeshNet, ml | change | this project's area, mm² | change | copy, "
        "PSNR | VAE, PSNR |",
        "|---" * 8 + "|",
    ]
    for brain in brains:
        volumes, areas = brain["meshnet_ventricles_ml"], brain["area_mm2"]
        lines.append(
            f"| {brain['patient']} | {brain['days']:.0f} | {volumes[0]:.1f}, {volumes[1]:.1f} | "
            f"{volumes[1] / volumes[0] - 1:+.1%} | {areas[0]:.0f}, {areas[1]:.0f} | {areas[1] / areas[0] - 1:+.1%} | "
            f"{brain['copy_psnr_db']:.1f} dB | {brain['vae_psnr_db']:.1f} dB |"
        )
    return [*lines, ""]


def _interval(numbers: Mapping[str, float]) -> str:
    return f"{numbers['gain_db']:+.2f} ({numbers['gain_db_low']:+.2f} to {numbers['gain_db_high']:+.2f})"
