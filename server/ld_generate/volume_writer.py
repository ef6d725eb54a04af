"""Writes edited volumes: NIfTI in the input's geometry, a DICOM series where the input was one, pictures, a record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ld_common.editing.base import Editor
from ld_common.editing.history import history_warnings
from ld_common.editing.registry import editor_options
from ld_common.imaging.modality import Attributes
from ld_common.imaging.nifti import write_nifti_like
from ld_common.imaging.preparation.files import write_prepared
from ld_common.imaging.secondary_capture import Place, Provenance, write_synthetic_dicom
from ld_common.imaging.volume import Volume
from ld_common.release.release import Release
from ld_generate.input_digest import describe_input, keyed_digest
from ld_generate.record import file_stem, write_record
from ld_generate.samples import INCHES, SYNTHETIC, make_folder, save_figure
from ld_generate.volume import VolumeEditRequest, extrapolated_slices
from ld_generate.volume_planes import PLANES, write_planes
from ld_generate.writer import DIFFERENCE_LIMIT

MONTAGE, PREPARED = "montage.png", "prepared.nii.gz"
"""The second is the scan after the modality's `preprocessing`, on the grid of the answers."""
MAX_COLUMNS = 8
AXIS_ENDS = ("LR", "PA", "FH")


def write_volumes(
    release: Release, request: VolumeEditRequest, volumes: Sequence[Volume], editor: Editor
) -> list[Path]:
    """Write the edited volumes, one a target, into the request's folder; returns what was written."""
    writer = _VolumeWriter(release, request, editor)
    files: list[Path] = []
    entries = []
    for target, volume in zip(request.targets, volumes, strict=True):
        written = writer.write(target, volume)
        files += written
        entries.append(
            {
                "target": target,
                "prompt": release.modality.prompt(request.source | target),
                "delta": editor.delta,
                "files": [file.relative_to(request.folder).as_posix() for file in written],
            }
        )
    if release.modality.preprocessing:
        files.append(write_prepared(request.folder / PREPARED, request.volume.voxels, request.volume.affine))
    files.append(_write_montage(request.folder / MONTAGE, request, volumes))
    files.append(write_planes(request.folder / PLANES, request, volumes))
    content = _description(release, request) | {"counterfactuals": entries}
    warnings = extrapolated_slices(release.modality, request)
    warnings += request.unfamiliarity_warnings
    warnings += [] if request.history is None else history_warnings(request.history.slices[0])
    return [*files, write_record(request.folder, release, editor, content, warnings)]


def _description(release: Release, request: VolumeEditRequest) -> dict[str, Any]:
    masks = request.preserve_masks
    return {
        "input": {
            **describe_input(request.path, request.volume.voxels, None if masks is None else np.stack(masks)),
            "shape": list(request.volume.voxels.shape),
            "voxels_to_mm": request.volume.affine.round(6).tolist(),
        },
        "source": request.source,
        "edited_slices": {
            "first": request.edited[0],
            "last": request.edited[-1],
            "of": len(request.volume.upright),
        },
        "changed_slices": {"first": request.changed[0], "last": request.changed[-1]},
        "other_slices": f"values of {'the prepared input' if release.modality.preprocessing else 'the input'}",
        "rendering": request.rendering,
        "window": [request.window.low, request.window.high],
        "seeds": [release.study.seed],
        "familiarity": None if request.unfamiliarity is None else request.unfamiliarity.record(),
        "history": _history(request),
        "watermark": request.watermark,
        "keep_geometry": request.keep_geometry,
    }


def _history(request: VolumeEditRequest) -> list[dict[str, Any]]:
    """For each earlier volume, how long ago it was, where its slices were taken, and a hash of the model's pictures."""
    history = request.history
    if history is None:
        return []
    return [
        {
            "years_before": round(years, 3),
            "slices": {"first": round(float(places[0]), 3), "last": round(float(places[-1]), 3)},
            "hmac_of_pictures": keyed_digest(past.pictures[row].numpy().tobytes() for past in history.slices),
        }
        for row, (years, places) in enumerate(zip(history.slices[0].years, history.places, strict=True))
    ]


@dataclass(frozen=True)
class _VolumeWriter:
    """Writes the files of one volume's targets."""

    release: Release
    request: VolumeEditRequest
    editor: Editor

    def write(self, target: Attributes, volume: Volume) -> list[Path]:
        """A NIfTI file, and a DICOM series where the input was one."""
        request, stem = self.request, file_stem(target, self.editor.delta)
        files = [request.folder / f"{stem}.nii.gz"]
        first, last, count = request.changed[0], request.changed[-1], len(volume.upright)
        description = f"slices {first} to {last} of 0 to {count - 1}; the others are the input's"
        write_nifti_like(files[0], volume.voxels, volume.affine, volume.header, description)
        if volume.header is None:
            files += self._write_series(target, volume, request.folder / stem)
        return files

    def _write_series(self, target: Attributes, volume: Volume, folder: Path) -> list[Path]:
        """One file for each slice of the input, in its plane and at its position."""
        make_folder(folder)
        row_mm, column_mm, distance_mm = map(float, np.linalg.norm(volume.affine[:3, [1, 0, 2]], axis=0))
        value_range = float(volume.voxels.min()), float(volume.voxels.max())
        digest, files = self._digest(target), []
        frame = volume.frame_of_reference if self.request.keep_geometry else ""
        for number in range(volume.voxels.shape[2]):
            pixels, original = (voxels[:, :, number].T for voxels in (volume.voxels, self.request.volume.voxels))
            edited = not np.array_equal(pixels, original)
            origin = "an edited slice" if edited else "a slice with the input's own values"
            affine = volume.affine.copy()
            affine[:, 3] = volume.affine @ (0, 0, number, 1)
            files.append(folder / f"IM{number + 1:04d}.dcm")
            write_synthetic_dicom(
                files[-1],
                pixels,
                (row_mm, column_mm),
                self.release.modality.prompt(self.request.source | target),
                Provenance(self.release.study.name, self.release.adapter_sha256, self.release.study.seed, digest),
                orientation=(_axis_letter(affine[:3, 0]), _axis_letter(affine[:3, 1])),
                marked=self.request.watermark and edited,
                place=Place(number + 1, affine, distance_mm, value_range, origin, frame),
            )
        return files

    def _digest(self, target: Attributes) -> str:
        """Keyed hash of the request: equal requests of an account get equal DICOM identifiers."""
        request = self.request
        drawn_as = {"edited": list(request.edited), "rendering": request.rendering, "watermark": request.watermark}
        options: list[Any] = [request.source, target, editor_options(self.editor), drawn_as]
        options += ["keep geometry"] if request.keep_geometry else []
        options += _history(request)
        masks = [] if request.preserve_masks is None else [mask.tobytes() for mask in request.preserve_masks]
        slabs = (slab.tobytes() for slab in request.volume.voxels)  # no copy of them all
        return keyed_digest(chain(slabs, masks, [json.dumps(options).encode()]))


def _axis_letter(direction: np.ndarray) -> str:
    """DICOM's letter for the main direction of a vector (to the right, to the front, up)."""
    axis = int(np.abs(direction).argmax())
    return AXIS_ENDS[axis][int(direction[axis] > 0)]


def _write_montage(path: Path, request: VolumeEditRequest, volumes: Sequence[Volume]) -> Path:
    """Up to `MAX_COLUMNS` edited slices: a row of the scan, and for each target one of the edit and the difference."""
    columns = np.unique(np.linspace(request.edited[0], request.edited[-1], MAX_COLUMNS).round().astype(int))
    scan, window = request.volume.upright, request.window
    rows = [("scan", scan, window.low, window.high, "gray")]
    limit = DIFFERENCE_LIMIT * (window.high - window.low) / 2
    for target, volume in zip(request.targets, volumes, strict=True):
        rows.append((file_stem(target, 0.0).replace("_", "\n"), volume.upright, window.low, window.high, "gray"))
        rows.append(("minus the scan", volume.upright - scan, -limit, limit, "RdBu_r"))
    figure = Figure(figsize=(INCHES * len(columns) + 1, 1.2 * INCHES * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    row_mm, column_mm = window.spacing_mm or (1.0, 1.0)
    for line, (name, slices, low, high, colours) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name, fontsize=8)
        for panel, index in zip(line, columns, strict=True):
            _draw_panel(panel, slices[index], colours, (low, high), row_mm / column_mm)
    for panel, index in zip(axes[0], columns, strict=True):
        panel.set_title(f"slice {index}", fontsize=8)
    figure.suptitle("synthetic, except for the first row", fontsize=8)
    return save_figure(path, figure, SYNTHETIC)


def _draw_panel(panel: Axes, pixels: np.ndarray, colours: str, limits: tuple[float, float], aspect: float) -> None:
    panel.imshow(pixels, cmap=colours, vmin=limits[0], vmax=limits[1], aspect=aspect)
    panel.set(xticks=[], yticks=[])
