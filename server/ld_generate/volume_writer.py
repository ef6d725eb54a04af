"""What an answered volume becomes: NIfTI in its input's geometry, a series of a series, a montage, a record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ld_common.editing.base import Editor
from ld_common.editing.registry import editor_options
from ld_common.imaging.modality import Attributes
from ld_common.imaging.nifti import write_nifti_like
from ld_common.imaging.secondary_capture import Place, write_synthetic_dicom
from ld_common.imaging.volume import Volume
from ld_common.release.release import Release
from ld_generate.samples import INCHES, SYNTHETIC
from ld_generate.volume import VolumeEditRequest, slices_about
from ld_generate.writer import DIFFERENCE_LIMIT, name_of, write_record

MONTAGE = "montage.png"
MOST_COLUMNS = 8
AXIS_ENDS = ("LR", "PA", "FH")


def write_volumes(
    release: Release, question: VolumeEditRequest, answers: Sequence[Volume], editor: Editor
) -> list[Path]:
    """Write the answers, one a target, into the question's folder; returns what was written."""
    folder, volume, files, told = question.folder, question.volume, [], []
    for target, answer in zip(question.targets, answers, strict=True):
        written = _write_answer(release, question, target, answer, editor)
        files += written
        told.append(
            {
                "set": target,
                "prompt": release.modality.prompt(question.factual | target),
                "drift": editor.delta,
                "files": [file.relative_to(folder).as_posix() for file in written],
            }
        )
    files.append(_write_montage(folder / MONTAGE, question, answers))
    about = {
        "name": question.path.name,
        "sha256_of_voxels": hashlib.sha256(volume.voxels.tobytes()).hexdigest(),
        "shape": list(volume.voxels.shape),
        "attributes": question.factual,
        "sha256_of_mask": None if question.kept is None else hashlib.sha256(_bytes_kept(question)).hexdigest(),
    }
    more = {
        "edited_slices": {"first": question.edited[0], "last": question.edited[-1], "of": len(volume.upright)},
        "other_slices": "the input's own values",
        "edited_values": "the input's own, plus the answer less the reconstruction",
        "window": [question.window.low, question.window.high],
        "seeds": [release.study.seed],
        "marked": question.mark,
    }
    return [*files, write_record(folder, release, editor, about, told, more, _far_slices(release, question))]


def _far_slices(release: Release, question: VolumeEditRequest) -> list[str]:
    """A sentence where slices are edited that lie further from the trained one than those edited by default."""
    known = slices_about(len(question.volume.upright), release.modality.image.slice_position)
    if set(question.edited) <= set(known):
        return []
    return [
        f"slices {question.edited[0]} to {question.edited[-1]}: the release learned from slices like "
        f"{known[0]} to {known[-1]}, others are extrapolated"
    ]


def _write_answer(
    release: Release, question: VolumeEditRequest, target: Attributes, answer: Volume, editor: Editor
) -> list[Path]:
    name = name_of(target, editor.delta)
    files = [question.folder / f"{name}.nii.gz"]
    first, last, count = question.edited[0], question.edited[-1], len(answer.upright)
    description = f"slices {first} to {last} of 0 to {count - 1}; the others are the input's"
    write_nifti_like(files[0], answer.voxels, answer.affine, answer.source, description)
    if answer.source is None:
        files += _write_series(release, question, target, answer, editor, question.folder / name)
    return files


def _write_series(
    release: Release, question: VolumeEditRequest, target: Attributes, answer: Volume, editor: Editor, folder: Path
) -> list[Path]:
    """One file a slice of the input's, in its plane and at its position."""
    folder.mkdir(exist_ok=True)
    row_mm, column_mm, distance_mm = map(float, np.linalg.norm(answer.affine[:3, [1, 0, 2]], axis=0))
    values, request = (float(answer.voxels.min()), float(answer.voxels.max())), _request(question, target, editor)
    files = []
    for number in range(answer.voxels.shape[2]):
        pixels, own = (voxels[:, :, number].T for voxels in (answer.voxels, question.volume.voxels))
        edited = not np.array_equal(pixels, own)
        origin = "an edited slice" if edited else "a slice with the input's own values"
        affine = answer.affine.copy()
        affine[:, 3] = answer.affine @ (0, 0, number, 1)
        files.append(folder / f"IM{number + 1:04d}.dcm")
        write_synthetic_dicom(
            files[-1],
            pixels,
            (row_mm, column_mm),
            release.modality.prompt(question.factual | target),
            release.adapter_sha256,
            model_name=release.study.name,
            seed=release.study.seed,
            request=request,
            orientation=(_letter(affine[:3, 0]), _letter(affine[:3, 1])),
            marked=question.mark and edited,
            place=Place(number + 1, affine, distance_mm, values, origin),
        )
    return files


def _letter(way: np.ndarray) -> str:
    """The main direction of a way to the right, to the front, up."""
    axis = int(np.abs(way).argmax())
    return AXIS_ENDS[axis][int(way[axis] > 0)]


def _request(question: VolumeEditRequest, target: Attributes, editor: Editor) -> str:
    """What was asked, as a hash."""
    words = json.dumps([question.factual, target, editor_options(editor), list(question.edited), question.mark])
    return hashlib.sha256(question.volume.voxels.tobytes() + _bytes_kept(question) + words.encode()).hexdigest()


def _bytes_kept(question: VolumeEditRequest) -> bytes:
    return b"" if question.kept is None else np.stack(question.kept).tobytes()


def _write_montage(path: Path, question: VolumeEditRequest, answers: Sequence[Volume]) -> Path:
    """Slices of the edited ones, from below: the scan's, and each answer's and their difference."""
    chosen = np.unique(np.linspace(question.edited[0], question.edited[-1], MOST_COLUMNS).round().astype(int))
    scan, window = question.volume.upright, question.window
    rows = [("scan", scan, window.low, window.high, "gray")]
    limit = DIFFERENCE_LIMIT * (window.high - window.low) / 2
    for target, answer in zip(question.targets, answers, strict=True):
        rows.append((name_of(target, 0.0).replace("_", "\n"), answer.upright, window.low, window.high, "gray"))
        rows.append(("less the scan", answer.upright - scan, -limit, limit, "RdBu_r"))
    figure = Figure(figsize=(INCHES * len(chosen) + 1, 1.2 * INCHES * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), len(chosen), squeeze=False)
    row_mm, column_mm = window.spacing_mm or (1.0, 1.0)
    for line, (name, slices, low, high, colours) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name, fontsize=8)
        for place, index in zip(line, chosen, strict=True):
            place.imshow(slices[index], cmap=colours, vmin=low, vmax=high, aspect=row_mm / column_mm)
            place.set(xticks=[], yticks=[])
    for place, index in zip(axes[0], chosen, strict=True):
        place.set_title(f"slice {index}", fontsize=8)
    figure.suptitle("synthetic, but for the first row", fontsize=8)
    figure.savefig(path, dpi=150, metadata=SYNTHETIC)
    return path
