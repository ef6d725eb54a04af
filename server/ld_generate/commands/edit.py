"""`ld-generate edit`: counterfactuals of scans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ld_common.core.command import loading, progress_bar
from ld_common.core.errors import RequestError
from ld_common.protocol.site_name import AUTO, RELEASE
from ld_generate.commands.send import SendOptions, send_written
from ld_generate.console import status
from ld_generate.options import (
    EDITOR,
    Card,
    EditorOptions,
    LoadOptions,
    NumSeeds,
    OutputOptions,
    ScanOptions,
    SliceIndex,
    Target,
    check_attributes,
    check_edit_drifts,
    read_targets,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ld_common.diffusion.base_model import BaseModel
    from ld_common.editing.base import Editor
    from ld_common.release.release import Release
    from ld_generate.request import EditRequest


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """What is edited, and how often."""

    target: Target
    slice_index: SliceIndex = None
    num_seeds: NumSeeds = 1
    card: Card = False
    drift: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Shift δ of the edit's steps: a number such as -0.1, '{RELEASE}', or '{AUTO}' to search for one. "
            f"Repeatable: writes a strip. By default {RELEASE}.",
            show_default=False,
            rich_help_panel=EDITOR,
        ),
    ] = None

    def __post_init__(self) -> None:
        check_edit_drifts(self.drifts)

    @property
    def drifts(self) -> list[str]:
        """Each `--drift`, or the release's."""
        return self.drift or [RELEASE]


def edit(
    load_options: LoadOptions,
    scans: ScanOptions,
    options: EditOptions,
    editor_options: EditorOptions,
    output: OutputOptions,
    send: SendOptions,
) -> None:
    """Edit scans: draw each as it would look with other attributes.

    Writes a folder for each scan: PNG and synthetic DICOM files, the reconstruction, difference maps and a record.
    KEY=VALUE sets an option of the editor, such as num_inference_steps=80.

    Example: ld-generate edit RELEASE --input scan.dcm --source diagnosis=CN --target age=84
    """
    check_attributes(load_options, options.target, scans.source)
    with loading(status):
        from ld_generate.loading import choose_editor, load_model, open_release
        from ld_generate.report import print_results
        from ld_generate.request import RequestOptions, make_folders, read_requests

    release = open_release(load_options)
    editor = choose_editor(release, editor_options)
    check_num_seeds(options.num_seeds, editor)
    request_options = RequestOptions.of(release.modality, scans, output, options.slice_index)
    targets = read_targets(release.modality, options.target)
    model = load_model(release, load_options)
    requests = read_requests(model, release, scans.inputs, targets, request_options)
    make_folders(requests)
    deltas = []
    for word in options.drifts:
        if word == AUTO:
            deltas.append(search_delta(model, release, requests, editor))
        else:
            deltas.append(editor.delta if word == RELEASE else float(word))
    files = draw_edits(model, release, requests, editor, list(dict.fromkeys(deltas)), options.num_seeds)
    if options.card:
        files += write_cards(release, [request.folder for request in requests])
    print_results(files, output.as_json)
    send_written(files, send)


def check_num_seeds(num_seeds: int, editor: Editor) -> None:
    """Refuse several seeds for an editor that draws no noise; raises `RequestError`."""
    from ld_common.editing.registry import EDITORS

    if num_seeds > 1 and not editor.draws_noise():
        drawing = ", ".join(name for name in EDITORS if EDITORS.load(name).draws_noise())
        raise RequestError(
            f"--num-seeds {num_seeds}: editor {editor.name} draws no noise; leave it out, or use an --editor that "
            f"draws noise: {drawing}"
        )


def draw_edits(
    model: BaseModel,
    release: Release,
    requests: Sequence[EditRequest],
    editor: Editor,
    deltas: Sequence[float],
    num_seeds: int,
) -> list[Path]:
    """Draw and write the counterfactuals of all requests under each δ, with a progress bar."""
    from ld_generate.writer import run_edits

    count = len(requests) + len(deltas) * sum(len(request.targets) for request in requests)
    with progress_bar(status, "drawing", count * num_seeds) as advance:
        return run_edits(model, release, requests, editor, deltas, advance, num_seeds)


def write_cards(release: Release, folders: Sequence[Path]) -> list[Path]:
    """Write the patient card of each folder of results, with a progress bar."""
    from ld_generate.card import write_card

    files: list[Path] = []
    with progress_bar(status, "patient cards", len(folders)) as advance:
        for folder in folders:
            files += write_card(folder, release)
            advance(1)
    return files


def search_delta(model: BaseModel, release: Release, requests: Sequence[EditRequest], editor: Editor) -> float:
    """The δ with which edits reach their target and stay near the reconstruction (arXiv 2412.20651, Eq. 5)."""
    import torch
    from rich.table import Table

    from ld_common.diffusion.drift_search import best
    from ld_common.editing.delta_search import search_counterfactual
    from ld_common.release.release import edit_drift
    from ld_generate.writer import edits_of, source_prompts

    edits, prompts = edits_of(release.modality, requests, [0.0]), source_prompts(release.modality, requests)
    images = torch.stack([request.image for request in requests])
    latents = torch.cat([model.encode(chunk) for chunk in images.split(editor.batch_size)])
    search, seed, drift = release.study.drift.search, release.study.seed, edit_drift(release)
    with progress_bar(status, "searching δ", len(search.deltas)) as advance:
        trials = search_counterfactual(
            model, latents, prompts, edits, search, editor, seed, drift, lambda *_: advance(1)
        )
    table = Table("δ", "loss", "target not reached", "distance to the reconstruction")
    for trial in trials:
        table.add_row(f"{trial.delta:+g}", f"{trial.loss:.4f}", *(f"{part:.4f}" for part in trial.parts.values()))
    status.print(table)
    chosen = best(trials)
    status.print(f"δ = {chosen.delta:+g}")
    return chosen.delta
