"""An edited volume in three planes, before and after, with the difference and its scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ld_common.imaging.volume import Volume
from ld_generate.record import file_stem
from ld_generate.samples import SYNTHETIC, save_figure
from ld_generate.volume import VolumeEditRequest
from ld_generate.writer import DIFFERENCE_LIMIT

PLANES = "planes.png"
PANEL_INCHES = 2.6
BAND = "#e0a100"


def write_planes(path: Path, request: VolumeEditRequest, volumes: Sequence[Volume]) -> Path:
    """Draw axial, coronal and sagittal planes of the scan and of each edited volume; returns `path`.

    The axial plane is the middle one of the edited slices. The others are those in which the first volume changes most;
    dashed lines are the ends of the edited slices, within which the model draws.
    """
    scan, window = request.volume.upright, request.window
    row_mm, column_mm = window.spacing_mm or (1.0, 1.0)
    changed = np.abs(volumes[0].upright - scan)
    middle = (request.edited[0] + request.edited[-1]) // 2
    row, column = (int(changed.sum(axes).argmax()) for axes in ((0, 2), (0, 1)))
    slice_mm = request.volume.slice_mm
    planes: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float, Literal["upper", "lower"]]] = {
        f"axial, slice {middle}": (lambda voxels: voxels[middle], row_mm / column_mm, "upper"),
        f"coronal, row {row}": (lambda voxels: voxels[:, row], slice_mm / column_mm, "lower"),
        f"sagittal, column {column}": (lambda voxels: voxels[:, :, column], slice_mm / row_mm, "lower"),
    }
    titles = ["scan"]
    for target in request.targets:
        titles += [f"synthetic: {file_stem(target, 0.0).replace('_', ', ').replace('-', ' ')}", "minus the scan"]
    limit = DIFFERENCE_LIMIT * (window.high - window.low) / 2
    figure = Figure(figsize=(PANEL_INCHES * len(titles) + 0.9, PANEL_INCHES * len(planes)), layout="constrained")
    axes = figure.subplots(len(planes), len(titles), squeeze=False)
    for line, (name, (cut, aspect, origin)) in zip(axes, planes.items(), strict=True):
        pictures = [(cut(scan), "gray", (window.low, window.high))]
        for volume in volumes:
            pictures.append((cut(volume.upright), "gray", (window.low, window.high)))
            pictures.append((cut(volume.upright - scan), "RdBu_r", (-limit, limit)))
        for panel, (pixels, colours, (low, high)) in zip(line, pictures, strict=True):
            panel.imshow(pixels, cmap=colours, vmin=low, vmax=high, aspect=aspect, origin=origin)
            panel.set(xticks=[], yticks=[])
            if origin == "lower":
                _mark_band(panel, request.edited)
        line[0].set_ylabel(name, fontsize=8)
    for panel, title in zip(axes[0], titles, strict=True):
        panel.set_title(title, fontsize=9)
    scale = ScalarMappable(Normalize(-50 * DIFFERENCE_LIMIT, 50 * DIFFERENCE_LIMIT), "RdBu_r")
    bar = figure.colorbar(scale, ax=axes, shrink=0.4, aspect=30, pad=0.01)
    bar.set_label("difference, % of the grey range", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return save_figure(path, figure, SYNTHETIC)


def _mark_band(panel: Axes, edited: range) -> None:
    for end in (edited[0] - 0.5, edited[-1] + 0.5):
        panel.axhline(end, color=BAND, lw=0.7, ls="--", alpha=0.8)
