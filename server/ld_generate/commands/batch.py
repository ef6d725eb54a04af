"""`ld-generate batch`: counterfactuals of the scans of a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ld_common.core.command import loading, progress_bar
from ld_generate.batch_table import DRAWN, OUTCOMES, VISIT, Outcome, read_rows
from ld_generate.commands.edit import write_cards
from ld_generate.commands.send import SendOptions, send_written
from ld_generate.console import print_note, status
from ld_generate.options import (
    BurnedInTextChecked,
    Card,
    EditorOptions,
    LoadOptions,
    OutputOptions,
    Rendering,
    Source,
    Strict,
    check_attributes,
    check_rendering,
)

Table = Annotated[
    Path,
    typer.Argument(
        metavar="TABLE",
        help="CSV file with one row a scan.",
        show_default=False,
    ),
]


def batch(
    load_options: LoadOptions,
    table: Table,
    editor_options: EditorOptions,
    output: OutputOptions,
    send: SendOptions,
    source: Source = "",
    burned_in_text_checked: BurnedInTextChecked = False,
    rendering: Rendering = "",
    strict: Strict = False,
    card: Card = False,
) -> None:
    """Edit the scans of a table; a row that fails does not stop the others.

    TABLE is a CSV file with a row a scan: the columns input (a path, relative to the table) and target (edits,
    separated by semicolons, such as age=84;age=90,diagnosis=AD), and optionally source, slice, history (earlier scans
    of the patient, such as first.dcm@70;second.dcm@72.5), or patient and date: each row is then drawn with the rows
    of the same patient before it as its history, and a row without a target is a visit. KEY=VALUE sets an option of
    the editor.

    Writes one folder a row, and batch.csv with the outcome of each row and the biomarkers of each answer. A second run
    draws only what is missing or changed. The exit code is 1 when a row failed.

    Example: ld-generate batch RELEASE scans.csv --source sex=F --out results
    """
    check_attributes(load_options, [], source)
    check_rendering(rendering)
    rows = len(read_rows(table))
    with loading(status):
        from ld_generate.batch import draw_batch
        from ld_generate.loading import choose_editor, load_model, open_release
        from ld_generate.request import RequestOptions
        from ld_generate.samples import make_folder

    release = open_release(load_options)
    editor = choose_editor(release, editor_options)
    options = RequestOptions(
        out=output.out,
        source=release.modality.parse_all(source),
        burned_in_text_checked=burned_in_text_checked,
        watermark=output.watermark,
        keep_geometry=output.keep_geometry,
        rendering=rendering,
        strict=strict,
    )
    model = load_model(release, load_options)
    make_folder(output.out)
    with progress_bar(status, "drawing", rows) as advance:
        outcomes = draw_batch(model, release, table, options, editor, advance)
    drawn = [output.out / outcome.folder for outcome in outcomes if outcome.outcome == DRAWN]
    if card:
        write_cards(release, drawn)
    _print_outcomes(outcomes, output)
    send_written([file for folder in drawn for file in sorted(folder.glob("*.dcm"))], send)
    if any(outcome.outcome not in (DRAWN, VISIT) for outcome in outcomes):
        raise typer.Exit(1)


def _print_outcomes(outcomes: Sequence[Outcome], output: OutputOptions) -> None:
    from ld_generate.report import print_json, print_warnings, summarize
    from ld_generate.samples import RECORD

    folders = [output.out / outcome.folder for outcome in outcomes if outcome.outcome == DRAWN]
    if output.as_json:
        results = [summarize(folder, [path for path in folder.rglob("*") if path.is_file()]) for folder in folders]
        print_json({"rows": [dataclasses.asdict(outcome) for outcome in outcomes], "results": results})
        return
    for outcome in outcomes:
        if outcome.outcome not in (DRAWN, VISIT):
            print_note(f"row {outcome.row}, {outcome.input}: {outcome.outcome}")
    print_warnings([folder / RECORD for folder in folders])
    visits = sum(outcome.outcome == VISIT for outcome in outcomes)
    words = f", and read {visits} visits without a target" if visits else ""
    print(f"drew {len(folders)} of {len(outcomes) - visits} rows{words}: see {output.out / OUTCOMES}")
