"""Files of the latent drift benchmark: the numbers of every run, a page of tables and verdicts, sheets of samples."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

from ld_common.core.atomic_files import write_bytes
from ld_simulations.benchmarks.harness import ResultStore, json_bytes
from ld_simulations.benchmarks.latent_drift.plan import (
    CONDITIONAL,
    HISTOGRAM,
    MAP,
    OFFSET_NOISE,
    PRIOR,
    STRIP,
    ZERO_SNR,
    Benchmark,
)
from ld_simulations.benchmarks.latent_drift.strip import strip_section, write_strip
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
"""Samples of a modality in all configurations, and in those of the first adapter alone."""
INCHES = 0.62
SHOWN_IN_SHEET = 10
FORMULATIONS = ("none", PRIOR, MAP, CONDITIONAL)
"""Formulations in the main table."""
CONTROLS = (HISTOGRAM, OFFSET_NOISE, ZERO_SNR)


def write_results(benchmark: Benchmark, store: ResultStore) -> list[Path]:
    """Write the page of the results that there are; returns the files. Sheets need the samples of this machine."""
    folder = Path(benchmark.config.results)
    runs = list(store.collect(drawing.name for drawing in benchmark.all_drawings).values())
    references = [
        row
        for rows in store.collect(f"reference-{modality}" for modality in benchmark.modalities).values()
        for row in rows
    ]
    write_bytes(folder / RUNS, json_bytes(runs))
    write_bytes(folder / REFERENCE, json_bytes(references))
    strip = store.read(STRIP) if benchmark.config.strip.modality else None
    write_bytes(folder / PAGE, page(benchmark, runs, references, strip).encode())
    files, adapters = [folder / RUNS, folder / REFERENCE, folder / PAGE], list(benchmark.config.adapters)
    for modality in benchmark.modalities:
        first = adapters[0]
        for name, shown_adapters in (
            (SHEET.format(modality), adapters),
            (SHORT_SHEET.format(modality, first), [first]),
        ):
            if _write_sheet(folder / name, benchmark, modality, shown_adapters):
                files.append(folder / name)
    if strip is not None:
        files += write_strip(folder, strip, Path(benchmark.config.output) / "sheets")
    return files


def page(
    benchmark: Benchmark, runs: Sequence[Run], references: Sequence[Run], strip: Mapping[str, Any] | None = None
) -> str:
    """The Markdown page."""
    config = benchmark.config
    real = config.test_patients * len(next(iter(benchmark.hospitals.values())).hospitals)
    where = " and ".join(sorted({f"{run['device']}, torch {run['torch']}" for run in runs}))
    planned = len(benchmark.all_drawings)
    missing = "" if len(runs) == planned else f" **{len(runs)} of {planned} planned results are there yet.**"
    lines = [
        "# Latent drift",
        "",
        f"Written by `make benchmark-latent-drift` (`ld-benchmark latent-drift`).{missing}",
        f"Samples are images of 64 x 64 pixels of simulated patients: {config.samples} of each configuration against "
        f"{real} images of other patients after the VAE (*real* below), with {config.sampler_steps} {config.sampler} "
        f"steps, on {where}. Values are means ± standard deviations over the seeds. All rows of a seed share the "
        "draws of their training and the noise of their samples, so differences between rows are paired.",
        "",
        "FD is the Fréchet distance and KD the kernel distance (squared MMD) of the named features; lower is better, "
        "and neither is comparable to the FID or KID of the literature, which use Inception's features. *Grey levels "
        "matched*: both sets are first given the same histogram image by image, so this distance ignores brightness "
        "and contrast. *Size slope*: how the measured size of the ventricles or the heart follows the prompt; 1 as "
        "in real scans, 0 not at all. *Size in range*: share of samples whose size lies in the central 98 % of real "
        "scans with the same attributes. *AUC on samples*: a classifier of the disease trained on real scans, tested "
        "on samples. *AUC, trained on samples*: one trained on samples, tested on real scans.",
        "",
    ]
    if strip is not None:
        lines += strip_section(strip)
    for modality in benchmark.modalities:
        of_modality = [reference for reference in references if reference["modality"] == modality]
        lines += _section(benchmark, modality, runs, of_modality)
    return "\n".join(lines)


def _section(benchmark: Benchmark, modality: str, runs: Sequence[Run], references: Sequence[Run]) -> list[str]:
    rows, metrics = rows_of(runs, modality), metrics_of(runs)
    if not rows:
        return []
    adapters = list(benchmark.config.adapters)
    lines = [f"## {modality.title()}", ""]
    lines += ["A percentage is the relative decrease of the metric, paired by seed.", ""]
    lines += ["| aim | measured | |", "|---|---|---|"]
    lines += [_verdict(verdict) for verdict in verdicts(runs, modality, adapters)]
    lines += ["", "### With and without drift", ""]
    lines += ["Compare the rows of one adapter: the first is without drift.", "", *_header(list(metrics), metrics)]
    for adapter in adapters:
        for formulation in FORMULATIONS:
            lines += _line(find(rows, adapter, formulation), metrics, f"**{adapter.replace('_', ' ')}**, ")
    lines += ["", "### Controls", ""]
    lines += ["Other corrections of brightness, alone and with drift, to compare with the rows above."]
    lines += ["", *_header(list(metrics), metrics)]
    for adapter in adapters:
        for control in CONTROLS:
            for formulation in FORMULATIONS:
                lines += _line(find(rows, adapter, formulation, control), metrics, f"{adapter.replace('_', ' ')}, ")
    lines += ["", "### Other forms of the drift", ""]
    lines += ["Other shapes and formulations, to compare with `drift` and `drift (map)` above."]
    lines += ["", *_header(list(metrics), metrics)]
    for row in rows:
        if row.formulation not in FORMULATIONS:
            lines += _line(row, metrics, f"{row.adapter.replace('_', ' ')}, ")
    lines += ["", "### Scores of real images", ""]
    lines += ["The best that samples can reach; the distance of other patients' images is the bias of FD at this size."]
    lines += ["", *_header(list(metrics), metrics)]
    for what, title in (("real", "images of other patients"), ("raw", "the same images before the VAE")):
        rows_of_kind = [reference for reference in references if reference["what"] == what]
        if rows_of_kind:
            lines += _line(ResultRow(modality, "", False, "", None, rows_of_kind), metrics, title, plain=True)
    auc = [reference["metrics"]["auc_real"] for reference in references if reference["what"] == "real"]
    if auc:
        lines += ["", f"A classifier trained on the real training scans alone has an AUC of {sum(auc) / len(auc):.3f}."]
    lines += [
        "",
        f"![{modality}: samples of the first seed, a row for each configuration]({SHEET.format(modality)})",
        "",
    ]
    return lines


def _verdict(verdict: AimVerdict) -> str:
    return f"| {verdict.aim} | {verdict.measured} | {'held' if verdict.met else '**did not hold**'} |"


def _header(names: Sequence[str], metrics: dict[str, Metric]) -> list[str]:
    titles = " | ".join(metrics[name].title for name in names)
    return [f"| | seeds | {titles} |", "|---" * (len(names) + 2) + "|"]


def _line(row: ResultRow | None, metrics: dict[str, Metric], start: str, plain: bool = False) -> list[str]:
    if row is None:
        return []
    cells = " | ".join(shown(row, name) for name in metrics)
    return [f"| {start}{'' if plain else row.title} | {len(row.runs)} | {cells} |"]


def _write_sheet(path: Path, benchmark: Benchmark, modality: str, adapters: Sequence[str]) -> bool:
    """A row of samples for each configuration, all from the same noise and prompts, real images on top.

    Returns whether there are samples to show.
    """
    folder, first = Path(benchmark.config.output) / "sheets", benchmark.config.seeds[0]
    shown_rows = [("real", folder / f"{modality}-real.safetensors")]
    for drawing in benchmark.all_drawings:
        training = drawing.training
        if (training.modality, training.seed) == (modality, first) and training.adapter in adapters:
            row = ResultRow(modality, training.adapter, drawing.drift, drawing.formulation, drawing.control, [])
            title = f"{training.adapter.replace('_', ' ')}, {row.title}"
            shown_rows.append((title, folder / f"{drawing.name}.safetensors"))
    shown_rows = [(title, file) for title, file in shown_rows if file.exists()]
    if len(shown_rows) < 2:
        return False
    count = SHOWN_IN_SHEET
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
    return True
