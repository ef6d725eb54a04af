"""One edit of the page: from the values of its controls to files and what they show."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import BaseModel
from ld_common.editing.base import Editor
from ld_common.editing.registry import change_editor
from ld_common.imaging.geometry import from_model, to_model
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.readers import read_scan
from ld_common.imaging.rendering import reference_of
from ld_common.imaging.scan_table import shown
from ld_common.release.release import Release, release_editor
from ld_generate.attribute_sweep import read_sweep
from ld_generate.request import RequestOptions, make_folders, read_requests
from ld_generate.samples import RECORD
from ld_generate.web.scans import earlier_scans
from ld_generate.writer import run_edits

PICTURES = ("scan", "reconstruction", "counterfactual")
"""What biomarkers are measured on."""
ControlValues = Mapping[str, float | str | None]
"""The value of a control for each attribute; None or empty where nothing was chosen."""


@dataclass(frozen=True)
class EditForm:
    """The values of all controls."""

    source: ControlValues
    target: ControlValues
    delta: float
    """Drift δ in the paper's units."""
    editor: str
    guidance_scale: float
    noise_fraction: float
    seed: int
    sweep: str = ""
    """attribute=first:last:step, or empty."""
    slice_index: int | None = None
    burned_in_text_checked: bool = False
    """A person has checked the pixels for burned-in text."""
    history: Sequence[Path] = ()
    """Earlier scans of the patient, in any order; ignored by editors that take none."""
    history_ages: str = ""
    """The patient's age in each, separated by commas; empty where the files have dates."""


@dataclass(frozen=True)
class EditResult:
    """The files of an edit and what is shown with them."""

    title: str
    settings: str
    pictures: dict[str, Path]
    """`scan`, `reconstruction`, `counterfactual` and `difference`, PNG."""
    dicom: Path
    nifti: Path | None
    """Only where the scan was one."""
    record: Path
    archive: Path
    """All files, as a zip."""
    biomarkers: dict[str, list[float]]
    """Areas in mm2, one for each of `PICTURES`."""
    reference: str
    """What the change of the answer is counted from, one of `PICTURES`."""
    band: dict[str, Any] | None
    """Around the answer's biomarker, as in the record; None where the release knows none."""
    warnings: list[str]
    evaluation: list[str]
    """What the release's evaluation says of such edits."""
    familiarity: dict[str, Any] | None
    """As in the record."""
    animation: Path | None
    curve: Path | None
    """Plot of a sweep over the age."""
    sweep_table: list[list[str]]
    """Rows of the sweep's CSV, the header first."""


@dataclass(frozen=True)
class Preview:
    """A scan before it is edited."""

    picture: np.ndarray
    """uint8 `(H,W)`: the scan at the model's resolution, in the scan's geometry."""
    attributes_in_file: Attributes


def preview(
    modality: Modality, resolution: int, path: Path, slice_index: int | None, burned_in_text_checked: bool
) -> Preview:
    """Read a scan as the model sees it; raises `ScanError`."""
    scan = read_scan(path, modality, slice_index, burned_in_text_checked)
    image, frame = to_model(scan, resolution, modality.image)
    shares = (from_model(image, frame) - frame.low) / (frame.high - frame.low)
    return Preview(np.round(255 * np.clip(shares, 0, 1)).astype(np.uint8), scan.attributes_in_file)


def draw(
    model: BaseModel,
    release: Release,
    scan: Path,
    form: EditForm,
    out: Path,
    progress: Callable[[float], None],
    strict: bool = False,
) -> EditResult:
    """Edit one scan into a folder inside `out`.

    Args:
        model: the base with the release's adapter.
        release: the release.
        scan: a file, or the folder of a DICOM series.
        form: the controls' values.
        out: folder that gets the scan's folder and the archive.
        progress: called with the finished share, 0 to 1.
        strict: refuse what the release's scans do not cover.

    Raises:
        LdError: a scan that cannot be used, values that cannot be drawn, or what `strict` refuses.
    """
    modality, editor = release.modality, _editor(release, form)
    source = _source(modality, form.source)
    target = _target(modality, form.target, source)
    sweep = read_sweep(modality, form.sweep) if form.sweep else None
    if not target and sweep is None:
        raise RequestError("nothing changes yet: move a control under “It should show”")
    options = RequestOptions(
        out=out,
        source=source,
        slice_index=form.slice_index,
        burned_in_text_checked=form.burned_in_text_checked,
        history=earlier_scans(form.history, form.history_ages) if editor.takes_move else (),
        strict=strict,
    )
    targets = [target] if target else []
    (request,) = read_requests(model, release, [scan], targets, options, sweep)
    make_folders([request])
    done, total = 0, 1 + len(request.targets)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(min(done / total, 1.0))

    seeded = replace(release, study=replace(release.study, seed=form.seed))
    files = run_edits(model, seeded, [request], editor, [editor.delta], advance)
    settings = _settings(editor, form.seed, len(options.history))
    return _result(modality, request.folder, files, settings, index=0 if target else -1)


def _editor(release: Release, form: EditForm) -> Editor:
    """The form's, with those of its options that it uses: the page hides the others."""
    editor = change_editor(release_editor(release), form.editor)
    options: dict[str, Any] = {
        "guidance_scale": form.guidance_scale,
        "noise_fraction": form.noise_fraction,
        "delta": form.delta,
    }
    return replace(editor, **{name: value for name, value in options.items() if name not in editor.unused})


def _result(modality: Modality, folder: Path, files: list[Path], settings: str, index: int) -> EditResult:
    """What the page shows of a folder of results: the counterfactual at `index`, and the sweep if there is one."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    entry = record["counterfactuals"][index]
    edited = [folder / name for name in entry["files"]]
    measured = [*(record["biomarkers_mm2"][name] for name in PICTURES[:2]), entry["biomarkers_mm2"]]
    tables = [file for file in files if file.suffix == ".csv"]
    return EditResult(
        title=_change(modality, record["source"], entry["target"]),
        settings=settings,
        pictures=_pictures(folder, edited),
        dicom=next(file for file in edited if file.suffix == ".dcm"),
        nifti=next((file for file in edited if file.name.endswith(".nii.gz")), None),
        record=folder / RECORD,
        archive=Path(shutil.make_archive(str(folder), "zip", folder)),
        biomarkers={name: [areas[name] for areas in measured] for name in measured[0]},
        reference=reference_of(record["rendering"]),
        band=entry["band"],
        warnings=record["warnings"],
        evaluation=record["evaluation"],
        familiarity=record["familiarity"],
        animation=next((file for file in files if file.suffix == ".gif"), None),
        curve=next((file for file in files if file.name.endswith("_curve.png")), None),
        sweep_table=list(csv.reader(tables[0].read_text(encoding="utf-8").splitlines())) if tables else [],
    )


def _source(modality: Modality, values: ControlValues) -> Attributes:
    missing = [name for name in modality.attributes if values[name] in (None, "")]
    if missing:
        raise RequestError(f"fill in under “The scan shows” what the file does not say: {', '.join(missing)}")
    return {name: _value(modality, name, values[name]) for name in modality.attributes}


def _target(modality: Modality, values: ControlValues, source: Attributes) -> Attributes:
    """The attributes that change; numbers are compared as prompts show them, rounded."""
    chosen = {name: _value(modality, name, value) for name, value in values.items() if value is not None}
    return {name: value for name, value in chosen.items() if _rounded(value) != _rounded(source[name])}


def _value(modality: Modality, name: str, value: float | str | None) -> float | str:
    return modality.parse(name, value if isinstance(value, str) else f"{value:.10g}")


def _rounded(value: float | str) -> float | str:
    return value if isinstance(value, str) else round(value)


def _change(modality: Modality, source: Attributes, target: Attributes) -> str:
    changes = []
    for name, value in target.items():
        attribute = modality.attributes[name]
        before, after = (attribute.categories.get(str(end), shown(end)) for end in (source[name], value))
        changes.append(f"{name} {before} → {after} {attribute.unit}".strip())
    return ", ".join(changes)


def _settings(editor: Editor, seed: int, earlier_scans: int) -> str:
    """The editor and the options that it uses."""
    delta = f"δ {editor.delta:+g}" if editor.delta else "δ 0"
    options = {
        "delta": delta,
        "guidance_scale": f"guidance {editor.guidance_scale:g}",
        "noise_fraction": f"noise {editor.noise_fraction:g}",
    }
    words = [editor.name, *(text for option, text in options.items() if option not in editor.unused)]
    words += [f"seed {seed}"] if editor.draws_noise() else []
    words += [f"{earlier_scans} earlier scan{'s' if earlier_scans > 1 else ''}"] if earlier_scans else []
    return ", ".join(words)


def _pictures(folder: Path, files: list[Path]) -> dict[str, Path]:
    """The four pictures of a counterfactual by what they show."""
    difference = next(file for file in files if file.name.endswith("_difference.png"))
    return {
        "scan": folder / "input.png",
        "reconstruction": folder / "reconstruction.png",
        "counterfactual": next(file for file in files if file.suffix == ".png" and file != difference),
        "difference": difference,
    }
