"""The benchmark's results as files: JSON of every run, a page of tables and verdicts, sheets of samples."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

from ld_common.core.atomic_files import write_bytes
from ld_simulations.benchmarks.latent_drift.execution import SHOWN
from ld_simulations.benchmarks.latent_drift.plan import (
    CONDITIONAL,
    HISTOGRAM,
    MAP,
    OFFSET_NOISE,
    PRIOR,
    ZERO_SNR,
    Benchmark,
)
from ld_simulations.benchmarks.latent_drift.table import (
    AimVerdict,
    Metric,
    ResultRow,
    Run,
    find,
    metrics_of,
    rows_of,
    shown,
    verdicts,
)

RUNS, REFERENCE, PAGE = "latent_drift.json", "latent_drift_reference.json", "latent_drift.md"
SHEET, SHORT_SHEET = "latent_drift_{}.png", "latent_drift_{}_{}.png"
"""Samples of a modality under all configurations, and under those of its first adapter alone."""
INCHES = 0.62
SHOWN_IN_SHEET = 10
FORMULATIONS = ("none", PRIOR, MAP, CONDITIONAL)
"""Those of the main table."""
CONTROLS = (HISTOGRAM, OFFSET_NOISE, ZERO_SNR)


def write_results(benchmark: Benchmark) -> list[Path]:
    """Write what is there, however far the benchmark has come; returns the files."""
    folder, runs = Path(benchmark.config.results), collect(benchmark)
    references = _references(benchmark)
    write_bytes(folder / RUNS, (json.dumps(runs, indent=1) + "\n").encode())
    write_bytes(folder / REFERENCE, (json.dumps(references, indent=1) + "\n").encode())
    write_bytes(folder / PAGE, page(benchmark, runs, references).encode())
    sheets, adapters = [], list(benchmark.config.adapters)
    for modality in benchmark.modalities:
        first = adapters[0]
        for name, of in ((SHEET.format(modality), adapters), (SHORT_SHEET.format(modality, first), [first])):
            sheets.append(folder / name)
            _write_sheet(sheets[-1], benchmark, modality, of)
    return [folder / RUNS, folder / REFERENCE, folder / PAGE, *sheets]


def collect(benchmark: Benchmark) -> list[Run]:
    """Every result that there is, in the order of the plan."""
    files = [Path(benchmark.config.output) / "runs" / f"{drawing.name}.json" for drawing in benchmark.all_drawings]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def _references(benchmark: Benchmark) -> list[Run]:
    found: list[Run] = []
    for modality in benchmark.modalities:
        file = Path(benchmark.config.output) / "runs" / f"reference-{modality}.json"
        found += json.loads(file.read_text()) if file.exists() else []
    return found


def page(benchmark: Benchmark, runs: Sequence[Run], references: Sequence[Run]) -> str:
    """The Markdown page."""
    config = benchmark.config
    real = config.test_patients * len(next(iter(benchmark.hospitals.values())).hospitals)
    where = " and ".join(sorted({f"{run['device']}, torch {run['torch']}" for run in runs}))
    planned = len(benchmark.all_drawings)
    missing = "" if len(runs) == planned else f" **{len(runs)} of {planned} planned results are there yet.**"
    lines = [
        "# Latent drift, measured",
        "",
        f"`make benchmark-ld` (`ld-evaluate --config configs/benchmark_ld.yaml`) wrote this page.{missing}",
        f"PictureSet of 64 x 64 pixels of rendered patients, {config.samples} samples of each configuration against "
        f"{real} pictures of other patients as the VAE returns them (what *real* means here), {config.sampler_steps} "
        f"{config.sampler} steps, on {where}. Mean ± standard deviation over the seeds; all rows of a seed share the "
        "draws of their training and the noise of their samples.",
        "",
        "FD is a Fréchet, KD a kernel distance (squared MMD) on the features named; neither is the FID or KID of the "
        "literature, which are of Inception's. *Grey levels matched*: both sets, real and drawn, are first given one "
        "histogram picture by picture, so this distance cannot see brightness or contrast. *Size slope*: how the "
        "measured size of the ventricles or the heart follows the prompt, 1 as in real scans, 0 not at all. *Size "
        "in range*: the share of samples whose size lies where that of 98 % of real scans of the same condition does. "
        "*AUC on samples*: a classifier of the disease trained on real scans, asked about samples. *AUC, trained on "
        "samples*: one trained on samples, asked about real scans.",
        "",
    ]
    for modality in benchmark.modalities:
        lines += _section(benchmark, modality, runs, [one for one in references if one["modality"] == modality])
    return "\n".join(lines)


def _section(benchmark: Benchmark, modality: str, runs: Sequence[Run], references: Sequence[Run]) -> list[str]:
    rows, known = rows_of(runs, modality), metrics_of(runs)
    if not rows:
        return []
    adapters = list(benchmark.config.adapters)
    lines = [f"## {modality.title()}", "", "| aim | measured | |", "|---|---|---|"]
    lines += [_verdict(one) for one in verdicts(runs, modality, adapters)]
    lines += ["", "### With and without drift", "", *_header(list(known), known)]
    for adapter in adapters:
        for formulation in FORMULATIONS:
            lines += _line(find(rows, adapter, formulation), known, f"**{adapter.replace('_', ' ')}**, ")
    lines += ["", "### Controls", "", *_header(list(known), known)]
    for adapter in adapters:
        for control in CONTROLS:
            for formulation in FORMULATIONS:
                lines += _line(find(rows, adapter, formulation, control), known, f"{adapter.replace('_', ' ')}, ")
    lines += ["", "### Other forms of the drift", "", *_header(list(known), known)]
    for row in rows:
        if row.formulation not in FORMULATIONS:
            lines += _line(row, known, f"{row.adapter.replace('_', ' ')}, ")
    lines += ["", "### What real pictures score", "", *_header(list(known), known)]
    for what, title in (("real", "pictures of other patients"), ("raw", "the same pictures before the VAE")):
        own = [one for one in references if one["what"] == what]
        if own:
            lines += _line(ResultRow(modality, "", False, "", None, list(own)), known, title, plain=True)
    auc = [one["metrics"]["auc_real"] for one in references if one["what"] == "real"]
    if auc:
        lines += ["", f"A classifier trained on the real training scans alone: AUC {sum(auc) / len(auc):.3f}."]
        lines += ["The distances of other patients' pictures are the bias of the Fréchet distance at this size."]
    lines += ["", f"![{modality}: samples of the first seed, one row a configuration]({SHEET.format(modality)})", ""]
    return lines


def _verdict(verdict: AimVerdict) -> str:
    return f"| {verdict.aim} | {verdict.measured} | {'held' if verdict.met else '**did not hold**'} |"


def _header(names: Sequence[str], known: dict[str, Metric]) -> list[str]:
    titles = " | ".join(known[name].title for name in names)
    return [f"| | seeds | {titles} |", "|---" * (len(names) + 2) + "|"]


def _line(row: ResultRow | None, known: dict[str, Metric], start: str, plain: bool = False) -> list[str]:
    if row is None:
        return []
    cells = " | ".join(shown(row, name) for name in known)
    return [f"| {start}{'' if plain else row.title} | {len(row.runs)} | {cells} |"]


def _write_sheet(path: Path, benchmark: Benchmark, modality: str, adapters: Sequence[str]) -> None:
    """One row of samples a configuration of these adapters, all from the same noise and prompts; real ones on top."""
    folder, first = Path(benchmark.config.output) / "sheets", benchmark.config.seeds[0]
    shown_rows = [("real", folder / f"{modality}-real.safetensors")]
    for drawing in benchmark.all_drawings:
        training = drawing.training
        if (training.modality, training.seed) == (modality, first) and training.adapter in adapters:
            row = ResultRow(modality, training.adapter, drawing.drift, drawing.formulation, drawing.control, [])
            title = f"{training.adapter.replace('_', ' ')}, {row.title}"
            shown_rows.append((title, folder / f"{drawing.name}.safetensors"))
    shown_rows = [(title, file) for title, file in shown_rows if file.exists()]
    count = min(SHOWN, SHOWN_IN_SHEET)
    figure = Figure(figsize=(INCHES * count + 2.9, INCHES * len(shown_rows)))
    left = 2.9 / (INCHES * count + 2.9)
    for number, (title, file) in enumerate(shown_rows):
        images = load_file(file)["images"][:count]
        strip = torch.cat(list(images[:, 0]), 1).numpy()
        axes = figure.add_axes((left, 1 - (number + 1) / len(shown_rows), 1 - left, 1 / len(shown_rows)))
        axes.imshow(strip, cmap="gray", vmin=-1, vmax=1, aspect="auto")
        axes.set_axis_off()
        figure.text(left - 0.01, 1 - (number + 0.5) / len(shown_rows), title, fontsize=7, ha="right", va="center")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("L").save(path, optimize=True)
