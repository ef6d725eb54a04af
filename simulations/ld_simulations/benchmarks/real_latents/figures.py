"""The page's two pictures: drifts by channel, and samples beside mean pictures. No single scan is shown."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ld_common.adapters.state_dict import read_tensors
from ld_simulations.benchmarks.real_latents.rows import BASE, DRAWN, GAUSSIAN, MATCHED, NO_DRIFT

SHEET = (BASE, GAUSSIAN, NO_DRIFT, MATCHED, *(row.name for row in DRAWN[1:]))
INCHES, SHOWN = 0.95, 6
"""Side of a picture, and samples of a row."""


def channel_figure(drifts: Mapping[str, Any], chance: float) -> bytes:
    """Drift of each channel with its 95 % interval, PNG: radiographs above, MR slices below."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    for axis, kind in zip(axes, ("radiographs", "MR slices"), strict=True):
        found = drifts[kind]
        values, low, high = (np.array(found[key]) for key in ("by_channel", "low", "high"))
        channels = np.arange(len(values))
        axis.axhspan(-chance, chance, color="0.9", zorder=0)
        axis.vlines(channels, low, high, color="0.4", linewidth=1)
        axis.plot(channels, values, "o", markersize=4)
        axis.axhline(0, color="0.6", linewidth=0.5)
        axis.set_title(f"{kind}, {found['pictures']} pictures of {found['groups']} patients", fontsize=9, loc="left")
        axis.set_ylabel("deviations", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[-1].set_xlabel("latent channel", fontsize=8)
    return _png(figure, 110)


def sample_figure(folder: Path, means: Mapping[str, Tensor]) -> bytes | None:
    """Mean pictures of the training patients, then a row a way of drawing; None where a row's samples are absent."""
    files = {name: folder / f"{name}.safetensors" for name in SHEET}
    if not all(file.exists() for file in files.values()):
        return None
    rows = {name: list(read_tensors(file)[0]["pictures"]) for name, file in files.items()}
    columns = 1 + SHOWN
    figure = Figure(figsize=(INCHES * columns + 2.2, INCHES * (len(rows) + 1) + 0.3))
    grid = figure.subplots(len(rows) + 1, columns, gridspec_kw={"wspace": 0.03, "hspace": 0.06})
    figure.subplots_adjust(left=2.2 / figure.get_figwidth(), right=0.995, top=0.95, bottom=0.005)
    for axis in grid.flat:
        axis.axis("off")
    for axis, (name, picture) in zip(grid[0], means.items(), strict=False):
        _show(axis, picture)
        axis.set_title(name.replace(", ", "\n"), fontsize=6.5)
    _label(grid[0, 0], "means of real radiographs")
    for line, (name, pictures) in zip(grid[1:], rows.items(), strict=True):
        _label(line[0], name)
        _sheet_row(line, pictures)
    return _png(figure, 85)


def _sheet_row(axes: Sequence[Any], pictures: Sequence[Tensor]) -> None:
    for axis, picture in zip(axes, pictures, strict=False):
        _show(axis, picture)


def _show(axis: Any, picture: Tensor) -> None:
    axis.imshow(picture[0], cmap="gray", vmin=-1, vmax=1)


def _label(axis: Any, name: str) -> None:
    axis.text(-0.08, 0.5, name.replace(", ", ",\n"), transform=axis.transAxes, ha="right", va="center", fontsize=7.5)


def _png(figure: Figure, dpi: int) -> bytes:
    """PNG with 64 colours, a third of the size."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()
