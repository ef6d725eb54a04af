"""`ld-generate`: how would this scan look if the patient were older, of the other sex, ill, or well?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ld_common.offline  # noqa: F401  (before any model library)
from ld_common.command import TRUST_HELP, UNSIGNED_HELP, progress_bar, run_cli
from ld_common.config import load_config, to_mapping
from ld_common.counterfactual import Counterfactuals, Edit, EditConfig, draw_counterfactuals
from ld_common.drift_search import best, search_counterfactual
from ld_common.errors import RequestError
from ld_common.images import Frame, Scan, from_model, read_scan, to_model, write_difference_png, write_nifti, write_png
from ld_common.modality import Attributes, Modality
from ld_common.models import BaseModel
from ld_common.release import Release, edit_drift, load_release_base, release_record, software
from ld_common.synthetic import write_synthetic_dicom
from ld_common.trusted_keys import read_trusted_release
from ld_server.draw import RECORD, STRIP, SYNTHETIC, draw_samples, write_strip
from ld_server.drift_choice import AUTO, RELEASE, DriftChoice, choose_drifts

NIFTI = (".nii", ".nii.gz")
SUFFIXES = (".nii.gz", ".nii", ".dcm", ".png")
DIFFERENCE_LIMIT = 1.0
"""Difference, in the model's range of 2, that is drawn in full colour, in every map alike."""

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()


@dataclass(frozen=True)
class Question:
    """One input: its scan in the model's frame, what it shows, and what is asked of it."""

    path: Path
    scan: Scan
    frame: Frame
    image: Tensor
    """`(1,S,S)` in [-1, 1]."""
    factual: Attributes
    targets: list[Attributes]
    """The changed attributes of each `--set`."""
    slice_index: int | None
    """The slice that was asked for; None is the one that training used."""
    folder: Path


@cli.command()
def generate(
    release: Path = typer.Option(..., help="Folder of a release."),
    inputs: list[Path] = typer.Option([], "--input", help="DICOM file or series folder, NIfTI or PNG; repeatable."),
    sets: list[str] = typer.Option([], "--set", help="attribute=value,... of one counterfactual; repeatable."),
    drift: list[str] = typer.Option(
        [RELEASE], help="release, a site's name, auto, or a shift of z_T such as -0.1; repeatable: a strip."
    ),
    samples: int = typer.Option(4, help="Without --input: pictures drawn from noise."),
    sampler: str = typer.Option("ddim", help="Without --input: ddim, dpm-solver++ or euler."),
    given: str = typer.Option("", help="attribute=value,... that the files do not say."),
    slice_index: int | None = typer.Option(None, "--slice", help="Slice of a volume; by default the trained one."),
    out: Path = typer.Option(Path("counterfactuals"), help="Folder for the results."),
    base: str | None = typer.Option(None, help="Base model, if not where the release says."),
    trust: str = typer.Option("", help=TRUST_HELP),
    allow_unsigned: bool = typer.Option(False, "--allow-unsigned", help=UNSIGNED_HELP),
    released: bool = typer.Option(False, help="A person has checked the inputs for burned-in text (DERIVED images)."),
    method: str = typer.Option(
        "", help="invert, belm or sdedit: how a scan is edited. By default as the release says."
    ),
    strength: float | None = typer.Option(
        None, help="How strongly to edit; 0 changes nothing. By default as the release says."
    ),
    depth: float | None = typer.Option(
        None, help="Share of the diffusion that is undone, above 0 and up to 1. As the release says."
    ),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    precision: str = typer.Option("float32", help="float32, bfloat16 or float16."),
    overrides: list[str] = typer.Argument(None, help="key=value of the edit: steps, refinements, batch_size."),
) -> None:
    """Draw counterfactuals of scans: PNG and synthetic DICOM, the reconstruction, difference maps, a record.

    Without --input, draw pictures of no patient with the attributes of --given.
    """
    named = {"method": method or None, "strength": strength, "depth": depth}
    extra = [f"{key}={value}" for key, value in named.items() if value is not None]
    loaded, notes = read_trusted_release(release, trust, allow_unsigned)
    config = load_config(EditConfig, None, [*(overrides or []), *extra], start=loaded.study.edit)
    known = loaded.modality.parse_all(given)
    model = load_release_base(loaded, base, device, precision)
    if not inputs:
        files = _draw(model, loaded, known, sets, drift, samples, config.steps, sampler, out)
    else:
        targets = [_target(loaded.modality, text) for text in sets]
        if not targets:
            raise RequestError("--set is missing: say what should be different, for example --set age=84")
        questions = read_questions(loaded.modality, model.side, inputs, targets, known, slice_index, released, out)
        deltas = _deltas(choose_drifts(loaded, [word for word in drift if word != AUTO]), config.delta)
        _make_folders(questions)
        deltas += [_search(model, loaded, questions, config)] if AUTO in drift else []
        files = _edit(model, loaded, questions, config, list(dict.fromkeys(deltas)))
    for note in notes:
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    for folder in sorted({file.parent for file in files}):
        console.print(f"wrote {folder}: {len([file for file in files if file.parent == folder])} files")


def _draw(
    model: BaseModel,
    release: Release,
    attributes: Attributes,
    sets: Sequence[str],
    drift: Sequence[str],
    samples: int,
    steps: int,
    sampler: str,
    out: Path,
) -> list[Path]:
    """Pictures from noise, with a bar."""
    if sets:
        raise RequestError("--set changes a scan: name one with --input, or describe samples with --given")
    if AUTO in drift:
        raise RequestError("--drift auto tries edits of scans: name some with --input")
    if samples < 1:
        raise RequestError(f"--samples is {samples}: use 1 or more")
    choices = choose_drifts(release, drift)
    with progress_bar(console, "drawing", samples * len(choices)) as advance:
        return draw_samples(model, release, attributes, choices, samples, steps, sampler, out, advance)


def _deltas(choices: Sequence[DriftChoice], release_delta: float) -> list[float]:
    """The shifts of edits; raises `RequestError` for a site's drift, as edits are drawn under the release's."""
    if any(choice.delta is None and choice.name != RELEASE for choice in choices):
        raise RequestError("edits are drawn under the release's drift, a site's is for samples: give a number")
    return [release_delta if choice.delta is None else choice.delta for choice in choices]


def _edit(
    model: BaseModel, release: Release, questions: Sequence[Question], config: EditConfig, deltas: Sequence[float]
) -> list[Path]:
    """Counterfactuals of scans under each δ, with a bar."""
    total = len(questions) + len(deltas) * sum(len(question.targets) for question in questions)
    with progress_bar(console, "drawing", total) as advance:
        return answer(model, release, questions, config, deltas, advance)


def _search(model: BaseModel, release: Release, questions: Sequence[Question], config: EditConfig) -> float:
    """The δ at which these edits reach their target and stay near the reconstruction (arXiv 2412.20651, Eq. 5)."""
    edits, factual = _edits(release.modality, questions, [0.0]), _factual_prompts(release.modality, questions)
    images = torch.stack([question.image for question in questions])
    latents = torch.cat([model.encode(chunk) for chunk in images.split(config.batch_size)])
    search = release.study.drift.search
    with progress_bar(console, "searching δ", len(search.deltas)) as advance:
        seed, drift = release.study.seed, edit_drift(release)
        trials = search_counterfactual(
            model, latents, factual, edits, search, config, seed, drift, lambda *_: advance(1)
        )
    table = Table("δ", "loss", "target not reached", "distance to the reconstruction")
    for trial in trials:
        table.add_row(f"{trial.delta:+g}", f"{trial.loss:.4f}", *(f"{part:.4f}" for part in trial.parts.values()))
    console.print(table)
    found = best(trials)
    console.print(f"δ = {found.delta:+g}")
    return found.delta


def read_questions(
    modality: Modality,
    side: int,
    inputs: Sequence[Path],
    targets: list[Attributes],
    given: Attributes,
    slice_index: int | None,
    released: bool,
    out: Path,
) -> list[Question]:
    """Read the inputs and settle what each shows; raises `ScanError` or `RequestError`."""
    questions = []
    for path, name in zip(inputs, folder_names(inputs), strict=True):
        scan = read_scan(path, modality, slice_index, released)
        image, frame = to_model(scan, side, modality.image)
        factual = _factual(modality, path, scan.attributes_in_file, given)
        questions.append(Question(path, scan, frame, image, factual, targets, slice_index, out / name))
    return questions


def folder_names(inputs: Sequence[Path]) -> list[str]:
    """A name of its own for each input's results; `series` of many patients are told apart by the folder above."""
    own = [
        next((path.name.removesuffix(end) for end in SUFFIXES if path.name.endswith(end)), path.name) for path in inputs
    ]
    names: list[str] = []
    for path, name in zip(inputs, own, strict=True):
        name = f"{path.resolve().parent.name}_{name}" if own.count(name) > 1 else name
        while name in names:
            name += "_"
        names.append(name)
    return names


def answer(
    base: BaseModel,
    release: Release,
    questions: Sequence[Question],
    config: EditConfig,
    deltas: Sequence[float],
    progress: Callable[[int], None],
) -> list[Path]:
    """Draw all questions under each δ in shared batches and write their files; returns what was written."""
    edits, factual = _edits(release.modality, questions, deltas), _factual_prompts(release.modality, questions)
    images = torch.stack([question.image for question in questions])
    drift, seed = edit_drift(release), release.study.seed
    drawn = draw_counterfactuals(base, images, factual, edits, config, progress, drift, seed)
    files: list[Path] = []
    for index, question in enumerate(questions):
        own = [row for row, edit in enumerate(edits) if edit.scan == index]
        single = Counterfactuals(drawn.autoencoded[index], drawn.reconstructions[index], drawn.images[own])
        files += write_answer(release, question, single, config, deltas)
    return files


def _edits(modality: Modality, questions: Sequence[Question], deltas: Sequence[float]) -> list[Edit]:
    """Every target of every question under every δ, in that order."""
    return [
        Edit(index, modality.describe(question.factual | target), delta)
        for index, question in enumerate(questions)
        for target in question.targets
        for delta in deltas
    ]


def _factual_prompts(modality: Modality, questions: Sequence[Question]) -> list[str]:
    return [modality.describe(question.factual) for question in questions]


def write_answer(
    release: Release, question: Question, drawn: Counterfactuals, config: EditConfig, deltas: Sequence[float]
) -> list[Path]:
    """One input's folder: images in the input's geometry, difference maps, the record; a strip of several δ."""
    folder, frame = question.folder, question.frame
    files = [folder / "input.png", folder / "reconstruction.png"]
    write_png(files[0], from_model(question.image, frame), frame, {})
    write_png(files[1], from_model(drawn.reconstructions, frame), frame, SYNTHETIC)
    restored, scale = from_model(drawn.reconstructions, frame), (frame.high - frame.low) / 2
    answers = []
    asked = [(target, delta) for target in question.targets for delta in deltas]
    for (target, delta), image in zip(asked, drawn.images, strict=True):
        name = "_".join(f"{key}-{_shown(value)}" for key, value in target.items())
        name += f"_drift{delta:+g}" if delta else ""
        values = from_model(image, frame)
        description = release.modality.describe(question.factual | target)
        written = [folder / f"{name}.png", folder / f"{name}_difference.png", folder / f"{name}.dcm"]
        write_png(written[0], values, frame, SYNTHETIC | {"Description": description})
        write_difference_png(written[1], (values - restored) / scale, SYNTHETIC, limit=DIFFERENCE_LIMIT)
        write_synthetic_dicom(
            written[2],
            values,
            question.scan.spacing_mm,
            description,
            release.manifest["files"]["adapter.safetensors"],
            model_name=release.study.name,
            seed=release.study.seed,
            request=_request(question, target, config, delta),
            orientation=question.scan.orientation,
        )
        if question.path.name.endswith(NIFTI):
            written.append(folder / f"{name}.nii.gz")
            write_nifti(written[-1], values, question.scan)
        files += written
        answers.append({"set": target, "prompt": description, "drift": delta, "files": [file.name for file in written]})
    if len(deltas) > 1:
        columns = {"reconstruction": [drawn.reconstructions] * len(question.targets)}
        columns |= {f"δ {delta:+g}": list(drawn.images[row :: len(deltas)]) for row, delta in enumerate(deltas)}
        files.append(write_strip(folder / STRIP, columns, " / ".join(map(_named, question.targets))))
    record = {
        "input": {
            "name": question.path.name,
            "sha256_of_pixels": hashlib.sha256(question.scan.pixels.tobytes()).hexdigest(),
            "slice": question.slice_index,
            "attributes": question.factual,
        },
        "release": release_record(release),
        "edit": to_mapping(config),
        "seed": release.study.seed,
        "counterfactuals": answers,
        "software": software(),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return [*files, folder / RECORD]


def _named(target: Attributes) -> str:
    return ", ".join(f"{key} {_shown(value)}" for key, value in target.items())


def _request(question: Question, target: Attributes, config: EditConfig, delta: float) -> str:
    """What was asked, as a hash: the same question gets the same identifiers, and nothing of the patient is in it."""
    words = json.dumps([question.factual, target, to_mapping(config), delta], sort_keys=True)
    return hashlib.sha256(question.scan.pixels.tobytes() + words.encode()).hexdigest()


def _make_folders(questions: Sequence[Question]) -> None:
    """Make the folders before anything is drawn; raises `RequestError` when one cannot be."""
    for question in questions:
        try:
            question.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(
                f"cannot write to '{question.folder}' ({error.strerror}): choose another --out"
            ) from error


def _target(modality: Modality, text: str) -> Attributes:
    target = modality.parse_all(text)
    if not target:
        raise RequestError(f"--set '{text}' changes nothing: give attribute=value")
    return target


def _factual(modality: Modality, path: Path, in_file: Attributes, given: Attributes) -> Attributes:
    for name in sorted(set(in_file) & set(given)):
        if _shown(in_file[name]) != _shown(given[name]):
            raise RequestError(f"{name} is {_shown(in_file[name])} in '{path}' and {_shown(given[name])} in --given")
    factual = {name: value for name, value in (in_file | given).items() if name in modality.attributes}
    missing = [name for name in modality.attributes if name not in factual]
    if missing:
        raise RequestError(f"'{path}' does not say {', '.join(missing)}: add --given {'=...,'.join(missing)}=...")
    return factual


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def main() -> None:
    """Entry point of `ld-generate`."""
    run_cli(cli)
