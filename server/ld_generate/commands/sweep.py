"""`ld-generate sweep`: a scan at several values of one attribute."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import typer

from ld_common.core.command import loading
from ld_common.imaging.modality import AGE
from ld_generate.attribute_sweep import read_sweep
from ld_generate.commands.edit import check_num_seeds, draw_edits, write_cards
from ld_generate.commands.send import SendOptions, send_written
from ld_generate.console import print_note, status
from ld_generate.options import (
    Card,
    Delta,
    EditorOptions,
    LoadOptions,
    NumSeeds,
    OutputOptions,
    ScanOptions,
    SliceIndex,
    check_attributes,
)


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The values of the attribute, and how often each is drawn."""

    values: Annotated[
        str,
        typer.Argument(
            metavar="ATTRIBUTE=FIRST:LAST:STEP",
            help="The attribute and its values, such as age=60:90:5.",
            show_default=False,
        ),
    ]
    slice_index: SliceIndex = None
    num_seeds: NumSeeds = 1
    drift: Delta = None
    card: Card = False


def sweep(
    load_options: LoadOptions,
    options: SweepOptions,
    scans: ScanOptions,
    editor_options: EditorOptions,
    output: OutputOptions,
    send: SendOptions,
) -> None:
    """Edit scans along one attribute: a strip, an animation and a table, beside the files of each value.

    Along the age also a plot of the modality's first biomarker, with the band of the release's evaluation and the
    cohort's curve, where it has them.

    KEY=VALUE sets an option of the editor, such as num_inference_steps=80.

    Example: ld-generate sweep RELEASE --input scan.dcm --source diagnosis=CN age=60:90:5
    """
    check_attributes(load_options, [], scans.source)
    modality = load_options.modality
    if modality is not None:
        read_sweep(modality, options.values)
    with loading(status):
        from ld_generate.age_band import missing_band
        from ld_generate.loading import choose_editor, load_model, open_release
        from ld_generate.report import print_results
        from ld_generate.request import RequestOptions, make_folders, read_requests

    release = open_release(load_options)
    editor = choose_editor(release, editor_options)
    editor = replace(editor, delta=options.drift[0]) if options.drift else editor
    check_num_seeds(options.num_seeds, editor)
    request_options = RequestOptions.of(release.modality, scans, output, options.slice_index)
    attribute_sweep = read_sweep(release.modality, options.values)
    model = load_model(release, load_options)
    requests = read_requests(model, release, scans.inputs, [], request_options, attribute_sweep)
    make_folders(requests)
    if attribute_sweep.attribute == AGE:
        for line in missing_band(release, editor, requests):
            print_note(f"note: {line}")
    files = draw_edits(model, release, requests, editor, [editor.delta], options.num_seeds)
    if options.card:
        files += write_cards(release, [request.folder for request in requests])
    print_results(files, output.as_json)
    send_written(files, send)
