"""The strip: samples of one training under several δ, a row for each noise, with what was measured of each column."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

from ld_common.core.atomic_files import write_bytes
from ld_simulations.benchmarks.harness import json_bytes
from ld_simulations.benchmarks.latent_drift.plan import STRIP

NUMBERS, PICTURE = "latent_drift_strip.json", "latent_drift_strip.png"
INCHES, GAP, LINES = 1.25, 0.12, 0.34
"""Side of a picture, gap before the real scans, and room above and below, for two lines of text each."""


def write_strip(folder: Path, result: Mapping[str, Any], sheets: Path) -> list[Path]:
    """Write the strip's numbers, and its picture where `sheets` has its samples; returns the files."""
    write_bytes(folder / NUMBERS, json_bytes({**result, **visible(result)}))
    files = [folder / NUMBERS]
    pictures = [sheets / f"{STRIP}-{number}.safetensors" for number in range(len(result["columns"]))]
    if all(file.exists() for file in pictures):
        write_bytes(folder / PICTURE, _draw(result["columns"], pictures))
        files.append(folder / PICTURE)
    return files


def visible(result: Mapping[str, Any]) -> dict[str, Any]:
    """Whether neighbouring columns differ: the smallest difference of background grey, and whether grey only falls."""
    greys = [column["background_grey"] for column in _drawn(result["columns"])]
    falls = [before - after for before, after in itertools.pairwise(greys)]
    return {
        "strip_min_grey_difference": round(min(abs(fall) for fall in falls), 1),
        "strip_monotone": all(fall > 0 for fall in falls) or all(fall < 0 for fall in falls),
    }


def strip_section(result: Mapping[str, Any]) -> list[str]:
    """Lines of the page: the picture and its table."""
    columns = result["columns"]
    names = [name for name in columns[0] if name.startswith("frechet_")]
    titles = [name.removeprefix("frechet_").replace("matched_", "") for name in names]
    matched = [", grey levels matched" if "matched_" in name else "" for name in names]
    heads = " | ".join(f"FD {title}{suffix}" for title, suffix in zip(titles, matched, strict=True))
    lines = [
        "## From the same noise under several δ",
        "",
        f"![samples of one training, a column for each δ, real images at the right]({PICTURE})",
        "",
        f"Each row starts from the same noise and prompt; {result['samples']} samples a column are measured. One "
        f"training ({result['adapter'].replace('_', ' ')} fine-tuning, {result['modality']}, without drift, seed "
        f"{result['seed']}), sampled from N(δ·d, I): d is the latent mean of the scans less that of the base, by "
        "channel, scaled to a root mean square of 1. The difference of the means asks for "
        f"δ = {result['delta_of_moments']:.3f}. Background grey is of 255.",
        "",
        f"| δ | background grey | {heads} |",
        "|---" * (2 + len(names)) + "|",
    ]
    for column in columns:
        delta = "real, other patients" if column["delta"] is None else f"{column['delta']:+g}"
        lines.append(
            f"| {delta} | {column['background_grey']:.0f} | {' | '.join(f'{column[name]:.1f}' for name in names)} |"
        )
    seen = visible(result)
    lines += [
        "",
        f"Smallest difference of background grey between neighbours: {seen['strip_min_grey_difference']:g} (visible "
        f"from 6); the grey {'is' if seen['strip_monotone'] else 'is **not**'} monotone in δ.",
        "",
    ]
    return lines


def _drawn(columns: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [column for column in columns if column["delta"] is not None]


def _draw(columns: Sequence[Mapping[str, Any]], pictures: Sequence[Path]) -> bytes:
    images = [load_file(file)["images"][:, 0].float().numpy() for file in pictures]
    rows = len(images[0])
    wide, high = INCHES * len(columns) + GAP, INCHES * rows + 2 * LINES
    distance = next(name for name in columns[0] if name.startswith("frechet_"))
    figure = Figure(figsize=(wide, high), facecolor="white")
    for number, (column, drawn) in enumerate(zip(columns, images, strict=True)):
        left = INCHES * number + (GAP if column["delta"] is None else 0)
        for row, image in enumerate(drawn):
            box = (left / wide, 1 - (LINES + INCHES * (row + 1)) / high, INCHES / wide, INCHES / high)
            axes = figure.add_axes(box)
            axes.imshow(image, cmap="gray", vmin=-1, vmax=1, aspect="auto")
            axes.set_axis_off()
        middle = (left + INCHES / 2) / wide
        title = "real" if column["delta"] is None else f"δ = {column['delta']:g}".replace("-", "\N{MINUS SIGN}")
        below = f"background {column['background_grey']:.0f}\nFD {column[distance]:.0f}"
        figure.text(middle, 1 - LINES / 2 / high, title, ha="center", va="center", fontsize=9)
        figure.text(middle, LINES / 2 / high, below, ha="center", va="center", fontsize=8)
    stream, small = io.BytesIO(), io.BytesIO()
    figure.savefig(stream, dpi=110)
    Image.open(stream).convert("L").save(small, format="png", optimize=True)
    return small.getvalue()
