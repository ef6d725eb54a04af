"""One question of the page: from what its controls say to the files of `ld_generate.writer`, and what they show."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import BaseModel
from ld_common.editing.registry import change_editor
from ld_common.imaging.geometry import from_model, to_model
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.scan_reader import read_scan
from ld_common.imaging.scan_table import shown
from ld_common.release.release import Release, release_editor
from ld_generate.attribute_sweep import read_sweep
from ld_generate.request import make_folders, read_requests
from ld_generate.samples import RECORD
from ld_generate.writer import run_edits

MEASURED = ("scan", "reconstruction", "counterfactual")
Chosen = Mapping[str, float | str | None]
"""What a control says for each attribute; None or nothing where nobody chose."""


@dataclass(frozen=True)
class EditForm:
    """All that the page's controls say."""

    shows: Chosen
    wanted: Chosen
    drift: float
    """δ in the paper's units."""
    editor: str
    guidance_scale: float
    noise_fraction: float
    seed: int
    trajectory: str = ""
    """attribute=first:last:step, or nothing."""
    slice_index: int | None = None
    released: bool = False
    """A person has looked at the pixels and found no burned-in text."""


@dataclass(frozen=True)
class EditResult:
    """The files of one answer, and what is said of them."""

    title: str
    settings: str
    pictures: dict[str, Path]
    """`scan`, `reconstruction`, `counterfactual` and `difference`, PNG."""
    dicom: Path
    nifti: Path | None
    """Where the scan was one."""
    record: Path
    archive: Path
    """All files, as a zip."""
    areas: dict[str, list[float]]
    """What is measured, in mm2, on each picture of `MEASURED`."""
    warnings: list[str]
    animation: Path | None
    trajectory: list[list[str]]
    """Rows of the trajectory's table, the first one its head."""


@dataclass(frozen=True)
class Preview:
    """A scan before anything is asked of it."""

    picture: np.ndarray
    """uint8 `(H,W)`: what the model will see of it, in the scan's geometry."""
    says: Attributes
    """What the file says of the modality's attributes."""


def preview(modality: Modality, side: int, scan: Path, slice_index: int | None, released: bool) -> Preview:
    """Read a scan as the model will; raises `ScanError`."""
    read = read_scan(scan, modality, slice_index, released)
    image, frame = to_model(read, side, modality.image)
    shares = (from_model(image, frame) - frame.low) / (frame.high - frame.low)
    return Preview(np.round(255 * np.clip(shares, 0, 1)).astype(np.uint8), read.attributes_in_file)


def draw(
    model: BaseModel, release: Release, scan: Path, form: EditForm, out: Path, progress: Callable[[float], None]
) -> EditResult:
    """Answer one question about one scan into a folder of its own in `out`.

    Args:
        progress: called with the share that is done.

    Raises:
        LdError: a scan or a question that cannot be used.
    """
    modality = release.modality
    given = _given(modality, form.shows)
    target = _changed(modality, form.wanted, given)
    along = read_sweep(modality, form.trajectory) if form.trajectory else None
    if not target and along is None:
        raise RequestError("nothing should be different yet: move a control under “It should show”")
    editor = replace(
        change_editor(release_editor(release), form.editor),
        guidance_scale=form.guidance_scale,
        noise_fraction=form.noise_fraction,
    )
    seeded = replace(release, study=replace(release.study, seed=form.seed))
    targets = [target] if target else []
    (question,) = read_requests(
        modality, model.resolution, [scan], targets, given, form.slice_index, form.released, out, along
    )
    make_folders([question])
    done, total = 0, 1 + len(question.targets)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(min(done / total, 1.0))

    files = run_edits(model, seeded, [question], editor, [form.drift], advance)
    record = json.loads((question.folder / RECORD).read_text())
    own = record["counterfactuals"][0 if target else -1]
    own_files = [question.folder / name for name in own["files"]]
    pictures = _pictures(question.folder, own_files)
    measured = [*(record["areas_mm2"][name] for name in MEASURED[:2]), own["areas_mm2"]]
    areas = {name: [one[name] for one in measured] for name in measured[0]}
    return EditResult(
        title=_difference(modality, question.factual, own["set"]),
        settings=_settings(form),
        pictures=pictures,
        dicom=next(file for file in own_files if file.suffix == ".dcm"),
        nifti=next((file for file in own_files if file.name.endswith(".nii.gz")), None),
        record=question.folder / RECORD,
        archive=Path(shutil.make_archive(str(out / question.folder.name), "zip", question.folder)),
        areas=areas,
        warnings=record["warnings"],
        animation=next((file for file in files if file.suffix == ".gif"), None),
        trajectory=next(
            (list(csv.reader(file.read_text().splitlines())) for file in files if file.suffix == ".csv"), []
        ),
    )


def _given(modality: Modality, shows: Chosen) -> Attributes:
    missing = [name for name in modality.attributes if shows[name] in (None, "")]
    if missing:
        raise RequestError(f"say under “The scan shows” what the file does not: {', '.join(missing)}")
    return {name: _value(modality, name, shows[name]) for name in modality.attributes}


def _changed(modality: Modality, wanted: Chosen, given: Attributes) -> Attributes:
    """What should be different; numbers are compared as the prompt has them, whole."""
    asked = {name: _value(modality, name, value) for name, value in wanted.items() if value is not None}
    return {name: value for name, value in asked.items() if _whole(value) != _whole(given[name])}


def _value(modality: Modality, name: str, value: float | str | None) -> float | str:
    return modality.parse(name, value if isinstance(value, str) else f"{value:.10g}")


def _whole(value: float | str) -> float | str:
    return value if isinstance(value, str) else round(value)


def _difference(modality: Modality, factual: Attributes, target: Attributes) -> str:
    told = []
    for name, value in target.items():
        known = modality.attributes[name]
        before, after = (known.categories.get(str(one), shown(one)) for one in (factual[name], value))
        told.append(f"{name} {before} → {after} {known.unit}".strip())
    return ", ".join(told)


def _settings(form: EditForm) -> str:
    drift = f"{form.drift:+g}" if form.drift else "0"
    return (
        f"δ {drift}, {form.editor}, guidance {form.guidance_scale:g}, noise {form.noise_fraction:g}, seed {form.seed}"
    )


def _pictures(folder: Path, files: list[Path]) -> dict[str, Path]:
    """The four pictures of an answer by what they show."""
    difference = next(file for file in files if file.name.endswith("_difference.png"))
    counterfactual = next(file for file in files if file.suffix == ".png" and file != difference)
    own = {"counterfactual": counterfactual, "difference": difference}
    return {"scan": folder / "input.png", "reconstruction": folder / "reconstruction.png", **own}
