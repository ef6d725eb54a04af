"""`ld-evaluate`: judge a release's counterfactuals on scans that it was not trained on."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console

from ld_common.core.command import loading, progress_bar, run_cli
from ld_common.core.config import load_config, nearest, require
from ld_common.core.errors import RequestError
from ld_common.core.version import VersionedCommand
from ld_common.editing.registry import EDITORS
from ld_evaluate.files import SCANS
from ld_evaluate.options import JudgeConfig
from ld_evaluate.report import write_release_report

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@cli.command(cls=VersionedCommand)
def evaluate(
    release: Path = typer.Argument(..., help="Folder of the release."),
    data: Path = typer.Option(..., help="Folder with scans.csv: patient, input, and the modality's attributes."),
    reference: Path | None = typer.Option(
        None, help="Table of real scans of other patients: adds effectiveness and realism."
    ),
    editor: list[str] = typer.Option([], help="Editor to judge; repeatable. Default: the one that the release names."),
    seeds: int = typer.Option(3, help="Number of noise seeds of each editor that draws noise."),
    base: str | None = typer.Option(None, help="Base model, if not where the release says."),
    out: Path = typer.Option(Path("evaluation"), help="Folder for the table and its numbers."),
    as_json: bool = typer.Option(False, "--json", help="Print the results as JSON."),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="cycles, cycled or predictor_steps."),
) -> None:
    """Draw counterfactuals of every scan, measure them, and write a page with its numbers.

    Measured are composition, reversibility, effectiveness and minimality, the prediction of follow-ups, realism, and
    for simulated patients the distance to the true counterfactual.
    """
    config = load_config(JudgeConfig, None, overrides or [])
    require(seeds > 0, f"--seeds is {seeds}: use 1 or more")
    for name in editor:
        require(name in EDITORS, f"--editor {name}: {nearest(name, list(EDITORS))}")
    for option, path in (("--data", data / SCANS), ("--reference", reference)):
        if path is not None and not path.is_file():
            raise RequestError(f"{option}: there is no file '{path}'")
    make_folder(out)
    console = Console(stderr=as_json)
    with loading(console):
        from ld_common.release.release import read_release, release_editor
        from ld_evaluate.evaluation import Evaluation, evaluate_release

    evaluation = Evaluation(release, data, reference, editor, seeds, base, config)
    names = editor or [release_editor(read_release(release)).name]
    total = sum(seeds if EDITORS.load(name).draws_noise() else 1 for name in names)
    with progress_bar(console, "judging", total) as advance:
        runs = evaluate_release(evaluation, lambda: advance(1))
    files = write_release_report(out, runs, runs[0]["release"], data)
    if as_json:
        print(json.dumps({"runs": runs}, indent=1, sort_keys=True))
    for file in files:
        console.print(f"wrote {file}", soft_wrap=True)


def make_folder(folder: Path) -> None:
    """Create the output folder; raises `RequestError` where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot write '{folder}' ({error.strerror}): choose another folder with --out") from error


def main() -> None:
    """Entry point of `ld-evaluate`."""
    run_cli(cli)


if __name__ == "__main__":
    main()
