"""What `ld-generate` does, with bars: pictures from noise, counterfactuals of scans, of volumes, of a table's rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.core.command import progress_bar
from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import BaseModel
from ld_common.diffusion.drift_search import best
from ld_common.editing.base import Editor
from ld_common.editing.delta_search import search_counterfactual
from ld_common.imaging.modality import Attributes, Modality
from ld_common.protocol.site_name import AUTO, RELEASE
from ld_common.release.release import Release, edit_drift
from ld_generate.batch import DRAWN, OUTCOMES, draw_batch, read_rows
from ld_generate.drift_choice import DriftChoice, choose_drifts
from ld_generate.request import EditRequest, read_target
from ld_generate.samples import RECORD, draw_samples, make_folder
from ld_generate.volume import VolumeEditRequest, draw_volume
from ld_generate.volume_writer import write_volumes
from ld_generate.writer import edits_of, factual_prompts, run_edits

console = Console()


def warnings_of(files: Sequence[Path]) -> list[str]:
    """What the records among these files warn of."""
    records = [json.loads(file.read_text()) for file in files if file.name == RECORD]
    return list(dict.fromkeys(f"warning: {line}" for record in records for line in record["warnings"]))


def read_targets(modality: Modality, sets: Sequence[str], needed: bool = True) -> list[Attributes]:
    """What each --set changes; raises `RequestError` for none where one is `needed`."""
    if needed and not sets:
        raise RequestError("--set is missing: say what should be different, for example --set age=84")
    return [read_target(modality, text) for text in sets]


def draw_rows(
    model: BaseModel,
    release: Release,
    table: Path,
    given: Attributes,
    released: bool,
    editor: Editor,
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

        outcomes = draw_batch(model, release, table, given, released, editor, out, show, mark)
    failed = [one for one in outcomes if one.outcome != DRAWN]
    for one in failed:
        console.print(f"row {one.row}, {one.input}: {one.outcome}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"drew {rows - len(failed)} of {rows} rows: see {out / OUTCOMES}", soft_wrap=True, highlight=False)
    records = [out / one.folder / RECORD for one in outcomes if one.outcome == DRAWN]
    if failed:
        for line in warnings_of(records):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(1)
    return records


def draw_pictures(
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


def edit_deltas(choices: Sequence[DriftChoice], release_delta: float) -> list[float]:
    """The shifts of edits; raises `RequestError` for a site's drift, as edits are drawn under the release's."""
    if any(choice.delta is None and choice.name != RELEASE for choice in choices):
        raise RequestError("edits are drawn under the release's drift, a site's is for samples: give a number")
    return [release_delta if choice.delta is None else choice.delta for choice in choices]


def edit_scans(
    model: BaseModel,
    release: Release,
    questions: Sequence[EditRequest],
    editor: Editor,
    deltas: Sequence[float],
    seeds: int,
) -> list[Path]:
    """Counterfactuals of scans under each δ, with a bar."""
    total = len(questions) + len(deltas) * sum(len(question.targets) for question in questions)
    with progress_bar(console, "drawing", total * seeds) as advance:
        return run_edits(model, release, questions, editor, deltas, advance, seeds)


def edit_volumes(
    model: BaseModel, release: Release, questions: Sequence[VolumeEditRequest], editor: Editor
) -> list[Path]:
    """Counterfactuals of volumes, with a bar that counts slices."""
    for question in questions:
        make_folder(question.folder)
    total = sum(len(question.edited) * (1 + len(question.targets)) for question in questions)
    with progress_bar(console, "drawing", total) as advance:
        return [
            file
            for question in questions
            for file in write_volumes(release, question, draw_volume(model, release, question, editor, advance), editor)
        ]


def search_delta(model: BaseModel, release: Release, questions: Sequence[EditRequest], editor: Editor) -> float:
    """The δ at which these edits reach their target and stay near the reconstruction (arXiv 2412.20651, Eq. 5)."""
    edits, factual = edits_of(release.modality, questions, [0.0]), factual_prompts(release.modality, questions)
    images = torch.stack([question.image for question in questions])
    latents = torch.cat([model.encode(chunk) for chunk in images.split(editor.batch_size)])
    search = release.study.drift.search
    with progress_bar(console, "searching δ", len(search.deltas)) as advance:
        seed, drift = release.study.seed, edit_drift(release)
        trials = search_counterfactual(
            model, latents, factual, edits, search, editor, seed, drift, lambda *_: advance(1)
        )
    table = Table("δ", "loss", "target not reached", "distance to the reconstruction")
    for trial in trials:
        table.add_row(f"{trial.delta:+g}", f"{trial.loss:.4f}", *(f"{part:.4f}" for part in trial.parts.values()))
    console.print(table)
    found = best(trials)
    console.print(f"δ = {found.delta:+g}")
    return found.delta
