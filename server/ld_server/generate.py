"""`ld-generate`: how would this scan look if the patient were older, of the other sex, ill, or well?"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

import ld_common.offline  # noqa: F401  (before any model library)
from ld_common.command import TRUST_HELP, UNSIGNED_HELP, progress_bar, run_cli
from ld_common.config import load_config
from ld_common.counterfactual import EditConfig
from ld_common.drift_search import best, search_counterfactual
from ld_common.errors import RequestError
from ld_common.methods import METHODS
from ld_common.modality import Attributes, Modality
from ld_common.models import BaseModel
from ld_common.release import Release, edit_drift, load_release_base
from ld_common.trusted_keys import read_trusted_release
from ld_server.answers import answer, edits_of, factual_prompts
from ld_server.batch import DRAWN, OUTCOMES, draw_batch, read_rows
from ld_server.draw import RECORD, draw_samples, make_folder
from ld_server.drift_choice import AUTO, RELEASE, DriftChoice, choose_drifts
from ld_server.page.cli import cli as page
from ld_server.questions import Question, make_folders, read_questions, read_target
from ld_server.trajectory import read_trajectory
from ld_server.volume import VolumeQuestion, draw_volume, read_volume_questions
from ld_server.volume_files import write_volumes

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()


@cli.command(epilog="A local web page of a release, in place of all this: ld-generate serve --help")
def generate(
    release: Path = typer.Option(..., help="Folder of a release."),
    inputs: list[Path] = typer.Option([], "--input", help="DICOM file or series folder, NIfTI or PNG; repeatable."),
    sets: list[str] = typer.Option([], "--set", help="attribute=value,... of one counterfactual; repeatable."),
    batch: Path | None = typer.Option(None, help="In place of --input and --set: a CSV with a row a scan."),
    volume: bool = typer.Option(False, "--volume", help="Edit volumes whole: NIfTI files, folders of a DICOM series."),
    slices: str = typer.Option(
        "", help="With --volume, first:last, from 0: what is edited. By default a twentieth of all."
    ),
    trajectory: str = typer.Option("", help="attribute=first:last:step: a strip, an animation and a table."),
    seeds: int = typer.Option(1, help="Draw each answer so often: their mean, their deviation, and all of them."),
    mask: Path | None = typer.Option(None, help="An image of the scan's size: what is not 0 in it stays as it is."),
    mark: bool = typer.Option(False, "--mark", help="Write the word synthetic into the pixels of what is drawn."),
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
    method: str = typer.Option("", help=f"{', '.join(METHODS)}. By default as the release says."),
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

    With --volume, volumes of the input's geometry: the slices near the one that the release was trained on are edited,
    all others stay the input's.

    Without --input, draw pictures of no patient with the attributes of --given.
    """
    named = {"method": method or None, "strength": strength, "depth": depth}
    extra = [f"{key}={value}" for key, value in named.items() if value is not None]
    loaded, notes = read_trusted_release(release, trust, allow_unsigned)
    config = load_config(EditConfig, None, [*(overrides or []), *extra], start=loaded.study.edit)
    known = loaded.modality.parse_all(given)
    model = load_release_base(loaded, base, device, precision)
    if volume and (batch is not None or not inputs or trajectory or slice_index is not None or seeds != 1):
        raise RequestError("--volume is of --input and --set, without --batch, --trajectory, --slice and --seeds")
    if slices and not volume:
        raise RequestError("--slices says which slices of a --volume are edited: give that as well, or one --slice")
    if batch is not None:
        if inputs or sets or trajectory or mask or drift != [RELEASE] or seeds != 1 or slice_index is not None:
            raise RequestError("--batch says itself which scans and edits: beside it, --given alone does")
        files = _draw_rows(model, loaded, batch, known, released, config, out, mark)
    elif not inputs:
        if trajectory or mask or seeds != 1 or slice_index is not None:
            raise RequestError("--trajectory, --mask, --seeds and --slice are of a scan: name one with --input")
        files = _draw(model, loaded, known, sets, drift, samples, config.steps, sampler, out, mark)
    elif volume:
        if AUTO in drift or len(drift) != 1:
            raise RequestError("--volume is drawn under one drift: give --drift once, and not auto")
        (delta,) = _deltas(choose_drifts(loaded, drift), config.delta)
        targets = _targets(loaded.modality, sets)
        volumes = read_volume_questions(
            loaded.modality, model.side, inputs, targets, known, slices, released, out, mask, mark
        )
        files = _edit_volumes(model, loaded, volumes, dataclasses.replace(config, delta=delta))
    else:
        targets = _targets(loaded.modality, sets, needed=not trajectory)
        along = read_trajectory(loaded.modality, trajectory) if trajectory else None
        if along is not None and len(drift) > 1:
            raise RequestError("--trajectory is drawn under one drift: give --drift once, or --set for each value")
        if seeds < 1 or (seeds > 1 and not METHODS[config.method]().uses_noise):
            drawing = ", ".join(name for name, method in METHODS.items() if method().uses_noise)
            raise RequestError(f"--seeds {seeds}: give 1, or more with a --method that draws noise: {drawing}")
        questions = read_questions(
            loaded.modality, model.side, inputs, targets, known, slice_index, released, out, along, mask, mark
        )
        deltas = _deltas(choose_drifts(loaded, [word for word in drift if word != AUTO]), config.delta)
        make_folders(questions)
        deltas += [_search(model, loaded, questions, config)] if AUTO in drift else []
        files = _edit(model, loaded, questions, config, list(dict.fromkeys(deltas)), seeds)
    for note in [*notes, *_warnings(files)]:
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    for folder in sorted({file.parent for file in files}) if batch is None else []:
        console.print(f"wrote {folder}: {len([file for file in files if file.parent == folder])} files")


def _warnings(files: Sequence[Path]) -> list[str]:
    """What the records among these files warn of."""
    records = [json.loads(file.read_text()) for file in files if file.name == RECORD]
    return list(dict.fromkeys(f"warning: {line}" for record in records for line in record["warnings"]))


def _targets(modality: Modality, sets: Sequence[str], needed: bool = True) -> list[Attributes]:
    """What each --set changes; raises `RequestError` for none where one is `needed`."""
    if needed and not sets:
        raise RequestError("--set is missing: say what should be different, for example --set age=84")
    return [read_target(modality, text) for text in sets]


def _draw_rows(
    model: BaseModel,
    release: Release,
    table: Path,
    given: Attributes,
    released: bool,
    config: EditConfig,
    out: Path,
    mark: bool,
) -> list[Path]:
    """A table's scans, with a bar: the records of those drawn; exit code 1 when a row was not."""
    rows = len(read_rows(table))
    with progress_bar(console, "drawing", rows) as advance:
        done = 0

        def show(now: int, _: int) -> None:
            nonlocal done
            advance(now - done)
            done = now

        outcomes = draw_batch(model, release, table, given, released, config, out, show, mark)
    failed = [one for one in outcomes if one.outcome != DRAWN]
    for one in failed:
        console.print(f"row {one.row}, {one.input}: {one.outcome}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"drew {rows - len(failed)} of {rows} rows: see {out / OUTCOMES}", soft_wrap=True, highlight=False)
    records = [out / one.folder / RECORD for one in outcomes if one.outcome == DRAWN]
    if failed:
        for line in _warnings(records):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(1)
    return records


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
    mark: bool,
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
        return draw_samples(model, release, attributes, choices, samples, steps, sampler, out, advance, mark)


def _deltas(choices: Sequence[DriftChoice], release_delta: float) -> list[float]:
    """The shifts of edits; raises `RequestError` for a site's drift, as edits are drawn under the release's."""
    if any(choice.delta is None and choice.name != RELEASE for choice in choices):
        raise RequestError("edits are drawn under the release's drift, a site's is for samples: give a number")
    return [release_delta if choice.delta is None else choice.delta for choice in choices]


def _edit(
    model: BaseModel,
    release: Release,
    questions: Sequence[Question],
    config: EditConfig,
    deltas: Sequence[float],
    seeds: int,
) -> list[Path]:
    """Counterfactuals of scans under each δ, with a bar."""
    total = len(questions) + len(deltas) * sum(len(question.targets) for question in questions)
    with progress_bar(console, "drawing", total * seeds) as advance:
        return answer(model, release, questions, config, deltas, advance, seeds)


def _edit_volumes(
    model: BaseModel, release: Release, questions: Sequence[VolumeQuestion], config: EditConfig
) -> list[Path]:
    """Counterfactuals of volumes, with a bar that counts slices."""
    for question in questions:
        make_folder(question.folder)
    total = sum(len(question.edited) * (1 + len(question.targets)) for question in questions)
    with progress_bar(console, "drawing", total) as advance:
        return [
            file
            for question in questions
            for file in write_volumes(release, question, draw_volume(model, release, question, config, advance), config)
        ]


def _search(model: BaseModel, release: Release, questions: Sequence[Question], config: EditConfig) -> float:
    """The δ at which these edits reach their target and stay near the reconstruction (arXiv 2412.20651, Eq. 5)."""
    edits, factual = edits_of(release.modality, questions, [0.0]), factual_prompts(release.modality, questions)
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


def main() -> None:
    """Entry point of `ld-generate`, and of `ld-generate serve`."""
    run_cli(page if sys.argv[1:2] == ["serve"] else cli)
