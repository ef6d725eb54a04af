"""What `ld-generate` answers: counterfactuals of scans, and the files they become."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ld_common.diffusion.base_model import BaseModel
from ld_common.editing.base import Editor
from ld_common.editing.counterfactuals import Counterfactuals, Edit, draw_several, edit_to
from ld_common.editing.registry import editor_options
from ld_common.imaging.geometry import Frame, from_model
from ld_common.imaging.image_io import write_difference_png, write_png
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.nifti import NIFTI, write_nifti
from ld_common.imaging.scan_table import shown
from ld_common.imaging.secondary_capture import write_synthetic_dicom
from ld_common.release.release import Release, edit_drift, release_editor, release_record, software
from ld_generate.attribute_sweep import areas_mm2, write_sweep
from ld_generate.preserve_mask import keep, keep_in_picture
from ld_generate.request import EditRequest
from ld_generate.samples import RECORD, STRIP, SYNTHETIC, extrapolated, write_strip
from ld_generate.watermark import mark

DIFFERENCE_LIMIT = 1.0
"""Difference, in the model's range of 2, that is drawn in full colour, in every map alike."""
UNCERTAINTY_LIMIT = 0.25
"""The same of the deviation between seeds."""
STRONG = 3.0
"""Times the release's own strength (or 1, if that is less): edits that are stronger are warned of."""


def run_edits(
    base: BaseModel,
    release: Release,
    questions: Sequence[EditRequest],
    editor: Editor,
    deltas: Sequence[float],
    progress: Callable[[int], None],
    seeds: int = 1,
) -> list[Path]:
    """Draw all questions under each δ in shared batches and write their files; returns what was written.

    Of several seeds, the answer is their mean, and each of them and their deviation by pixel are written as well.
    """
    edits, factual = edits_of(release.modality, questions, deltas), factual_prompts(release.modality, questions)
    images = torch.stack([question.image for question in questions])
    numbers = range(release.study.seed, release.study.seed + seeds)
    drawn, each = draw_several(base, images, factual, edits, editor, numbers, progress, edit_drift(release))
    files: list[Path] = []
    for index, question in enumerate(questions):
        own = [row for row, edit in enumerate(edits) if edit.scan == index]
        single = Counterfactuals(drawn.autoencoded[index], drawn.reconstructions[index], drawn.images[own])
        files += write_answer(release, question, single, editor, deltas, each[own])
    return files


def edits_of(modality: Modality, questions: Sequence[EditRequest], deltas: Sequence[float]) -> list[Edit]:
    """Every target of every question under every δ, in that order."""
    return [
        edit_to(modality, index, question.factual, target, delta)
        for index, question in enumerate(questions)
        for target in question.targets
        for delta in deltas
    ]


def factual_prompts(modality: Modality, questions: Sequence[EditRequest]) -> list[str]:
    """What each question's scan shows, in words."""
    return [modality.prompt(question.factual) for question in questions]


def write_answer(
    release: Release,
    question: EditRequest,
    drawn: Counterfactuals,
    editor: Editor,
    deltas: Sequence[float],
    each: Tensor,
) -> list[Path]:
    """One input's folder: images in the input's geometry, difference maps, the record; a strip of several δ.

    `each` `(M,K,1,S,S)` are the answers of the K seeds, whose means `drawn` holds.
    """
    folder, frame = question.folder, question.frame
    files = [folder / "input.png", folder / "reconstruction.png"]
    write_png(files[0], from_model(question.image, frame), frame, {})
    restored, answers = from_model(drawn.reconstructions, frame), []
    write_png(files[1], _marked(question, restored), frame, SYNTHETIC)
    asked = [(target, delta) for target in question.targets for delta in deltas]
    shown = keep_in_picture(question.kept, question.scan, question.image, drawn.images, release.modality)
    scan, restoration, *areas = areas_mm2(
        release.modality, frame, torch.stack([question.image, drawn.reconstructions, *shown])
    )
    for (target, delta), image, own, area in zip(asked, drawn.images, each, areas, strict=True):
        request = _request(question, target, editor, delta)
        written = _write_edit(release, question, target, delta, image, restored, request)
        by_seed = {}
        if len(own) > 1:
            written += _write_seeds(release, question, target, delta, own)
            kept = keep_in_picture(question.kept, question.scan, question.image, own, release.modality)
            by_seed = {"areas_mm2_by_seed": areas_mm2(release.modality, frame, kept)}
        files += written
        description = release.modality.prompt(question.factual | target)
        names = [file.name for file in written]
        said = {"set": target, "prompt": description, "drift": delta, "files": names, "areas_mm2": area}
        answers.append(said | by_seed)
    if len(deltas) > 1:
        columns = {"reconstruction": [drawn.reconstructions] * len(question.targets)}
        columns |= {f"δ {delta:+g}": list(drawn.images[row :: len(deltas)]) for row, delta in enumerate(deltas)}
        files.append(write_strip(folder / STRIP, columns, " / ".join(map(_named, question.targets))))
    if question.trajectory is not None:
        pictures = question.image, drawn.reconstructions, list(shown[-len(question.trajectory.values) :])
        files += write_sweep(folder, release.modality, question.trajectory, frame, question.factual, *pictures)
    about = {
        "name": question.path.name,
        "sha256_of_pixels": hashlib.sha256(question.scan.pixels.tobytes()).hexdigest(),
        "slice": question.slice_index,
        "attributes": question.factual,
        "sha256_of_mask": None if question.kept is None else hashlib.sha256(question.kept.tobytes()).hexdigest(),
    }
    seeds = [release.study.seed + number for number in range(each.shape[1])]
    more = {"seeds": seeds, "marked": question.mark, "areas_mm2": {"scan": scan, "reconstruction": restoration}}
    return [*files, write_record(folder, release, editor, about, answers, more)]


def write_record(
    folder: Path,
    release: Release,
    editor: Editor,
    about: dict[str, Any],
    answers: list[dict[str, Any]],
    more: dict[str, Any],
    warnings: Sequence[str] = (),
) -> Path:
    """Write what is needed to draw it again: of the input, of each answer, and `more`; and what is to be warned of."""
    asked = [about["attributes"], *(answer["set"] for answer in answers)]
    record = {
        "input": about,
        "release": release_record(release),
        "edit": editor_options(editor),
        "counterfactuals": answers,
        "software": software(),
        "warnings": [*extrapolated(release, asked), *_too_strong(release, editor), *warnings],
        **more,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return folder / RECORD


def _too_strong(release: Release, editor: Editor) -> list[str]:
    scale, own = editor.guidance_scale, release_editor(release).guidance_scale
    if scale <= STRONG * max(own, 1.0):
        return []
    return [f"guidance_scale {scale:g}: the release recommends {own:g}; this may draw what no scan shows"]


def _write_edit(
    release: Release,
    question: EditRequest,
    target: Attributes,
    delta: float,
    image: Tensor,
    restored: np.ndarray,
    request: str,
) -> list[Path]:
    """One answer `(1,S,S)` in each format, and its difference from the reconstruction's real values `(H,W)`."""
    frame, name = question.frame, name_of(target, delta)
    values = keep(question.kept, question.scan, from_model(image, frame))
    pixels = _marked(question, values)
    description = release.modality.prompt(question.factual | target)
    written = [question.folder / f"{name}{ending}" for ending in (".png", "_difference.png", ".dcm")]
    write_png(written[0], pixels, frame, SYNTHETIC | {"Description": description})
    before = keep(question.kept, question.scan, restored)  # nothing differs where the scan is kept
    _write_map(question, written[1], values - before, DIFFERENCE_LIMIT)
    write_synthetic_dicom(
        written[2],
        pixels,
        question.scan.spacing_mm,
        description,
        release.adapter_sha256,
        model_name=release.study.name,
        seed=release.study.seed,
        request=request,
        orientation=question.scan.orientation,
        marked=question.mark,
    )
    if question.path.name.lower().endswith(NIFTI):
        written.append(question.folder / f"{name}.nii.gz")
        write_nifti(written[-1], pixels, question.scan)
    return written


def _write_seeds(release: Release, question: EditRequest, target: Attributes, delta: float, own: Tensor) -> list[Path]:
    """Each seed's answer `(K,1,S,S)` and the deviation by pixel."""
    description = release.modality.prompt(question.factual | target)
    frame, name, written, values = question.frame, name_of(target, delta), [], []
    for seed, image in enumerate(own, start=release.study.seed):
        values.append(keep(question.kept, question.scan, from_model(image, frame)))
        written.append(question.folder / f"{name}_seed-{seed}.png")
        write_png(written[-1], _marked(question, values[-1]), frame, SYNTHETIC | {"Description": description})
    written.append(question.folder / f"{name}_uncertainty.png")
    _write_map(question, written[-1], np.std(values, axis=0, ddof=1), UNCERTAINTY_LIMIT)
    return written


def _write_map(question: EditRequest, path: Path, values: np.ndarray, limit: float) -> None:
    """Real values `(H,W)` in colour, the fullest at `limit` of the model's range."""
    shares = values / _unit(question.frame)
    write_difference_png(path, mark(shares, 0.0, limit) if question.mark else shares, SYNTHETIC, limit=limit)


def _marked(question: EditRequest, values: np.ndarray) -> np.ndarray:
    return mark(values, question.frame.low, question.frame.high) if question.mark else values


def name_of(target: Attributes, delta: float) -> str:
    """Of an answer's files."""
    name = "_".join(f"{key}-{shown(value)}" for key, value in target.items())
    return name + (f"_drift{delta:+g}" if delta else "")


def _unit(frame: Frame) -> float:
    """Real values that are 1 in the model's range of 2."""
    return (frame.high - frame.low) / 2


def _named(target: Attributes) -> str:
    return ", ".join(f"{key} {shown(value)}" for key, value in target.items())


def _request(question: EditRequest, target: Attributes, editor: Editor, delta: float) -> str:
    """What was asked, as a hash: the same question gets the same identifiers, and nothing of the patient is in it."""
    words = json.dumps([question.factual, target, editor_options(editor), delta, question.mark], sort_keys=True)
    kept = b"" if question.kept is None else question.kept.tobytes()
    return hashlib.sha256(question.scan.pixels.tobytes() + kept + words.encode()).hexdigest()
