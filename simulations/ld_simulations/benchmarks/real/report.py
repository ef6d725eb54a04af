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
RADIOGRAPHS_SEEN = (
    "Looked at, the worst answers first: where the drift is worst it draws dark and bright patches that no radiograph "
    "has, and ribs come out as stripes. Its best answers gain where the follow-up was taken lying and tilted, by "
    "becoming brighter as a whole. None of the pictures shows an opacity that comes or goes."
)
BRAINS_SEEN = (
    "Looked at: the MeshNet follows the ventricles in all four slices. In all but the first, the choroid plexus is "
    "bright, which this project's measure of dark pixels takes for tissue: it misses more than half of what the "
    "MeshNet sees there. Its areas may be compared between scans of one sequence only."
)
"""What a person saw in the pictures below `output`, on 2026-11-30."""


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
        *_reading(numbers, rivals[rival]),
    ]
    return lines


def _reading(numbers: Mapping[str, Mapping[str, float]], rival_db: float) -> list[str]:
    """What the table says, where it says it."""
    said = []
    if rival_db > numbers[DRIFT]["gain_db"]:
        said.append(
            "A rule that knows no change is nearer to the follow-up than the drift. The pictures are not registered: "
            "most of what differs is position and exposure, and whatever lies nearer to the mean picture has the "
            "smaller error. Nothing here says that the drift sees the disease."
        )
    if numbers[DRIFT_HISTORY]["gain_db"] < numbers[DRIFT]["gain_db"]:
        said.append(
            "Earlier visits make the answer worse: `own_slope_half` was chosen for visits that lie on each other, and "
            "here the slope between two visits is that of their position."
        )
    return [*said, ""] if said else []


def brain_lines(brains: Sequence[Mapping[str, Any]]) -> list[str]:
    """The section on two visits of real brains."""
    lines = [
        "## Ventricles of two brains by an independent judge",
        "",
        "A MeshNet, trained on other data by others, segments both visits of two patients with multiple sclerosis and "
        "strips the skull; this project's measure then sees the slice in which the MeshNet sees most of them. *Copy* "
        "is how alike both visits' slices are, *VAE* how well the second one passes the base's autoencoder: an answer "
        "can show a change only if it is larger than what the VAE loses.",
        "",
        "| patient | days | lateral ventricles by MeshNet, ml | change | in the slice, by MeshNet, mm² | change "
        "| by this project's measure, mm² | change | copy, PSNR | VAE, PSNR |",
        "|---" * 10 + "|",
    ]
    for brain in brains:
        changes = []
        for key, digits in (("meshnet_ventricles_ml", 1), ("meshnet_area_mm2", 0), ("area_mm2", 0)):
            first, last = brain[key]
            changes.append(f"{first:.{digits}f}, {last:.{digits}f} | {last / first - 1:+.1%}")
        lines.append(
            f"| {brain['patient']} | {brain['days']:.0f} | {' | '.join(changes)} | {brain['copy_psnr_db']:.1f} dB | "
            f"{brain['vae_psnr_db']:.1f} dB |"
        )
    return [*lines, "", BRAINS_SEEN, ""]


def _interval(numbers: Mapping[str, float]) -> str:
    return f"{numbers['gain_db']:+.2f} ({numbers['gain_db_low']:+.2f} to {numbers['gain_db_high']:+.2f})"
