"""`ld-evaluate`: judge a release's counterfactuals on scans that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ld_common.core.command import VERSION, Json, grouped, loading, print_json, progress_bar, run_cli
from ld_common.core.config import load_config, nearest, require
from ld_common.core.errors import RequestError
from ld_common.editing.registry import EDITORS
from ld_evaluate.files import SCANS
from ld_evaluate.options import JudgeConfig
from ld_evaluate.report import write_release_report

RENAMED = {
    "--release": "RELEASE, the first argument",
    "--method": "--editor",
    "--seeds": "--num-seeds",
    "--config": "ld-benchmark STUDY --config",
}
"""Former options, and what took their place."""

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class ScanSources:
    """What a release is judged on."""

    data: Annotated[Path, typer.Option(help="Folder with scans.csv: patient, input, and the modality's attributes.")]
    reference: Annotated[
        Path | None, typer.Option(help="Table of real scans of other patients: adds effectiveness and realism.")
    ] = None


@dataclass(frozen=True)
class Editors:
    """What judges the release's edits, and how often."""

    editor: Annotated[
        list[str] | None, typer.Option(help="Editor; repeatable. Default: the one that the release names.")
    ] = None
    num_seeds: Annotated[int, typer.Option(help="Number of noise seeds of each editor that draws noise.")] = 3
    base: Annotated[str | None, typer.Option(help="Base model, if not where the release says.")] = None


@dataclass(frozen=True)
class Output:
    """Where the results go."""

    out: Annotated[Path, typer.Option(help="Folder for the page and its numbers.")] = Path("evaluation")
    as_json: Json = False


def evaluate(
    release: Annotated[Path, typer.Argument(help="Folder of the release.")],
    scans: ScanSources,
    editors: Editors,
    output: Output,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="cycles, cycled or predictor_steps."),
    ] = None,
    version: bool = VERSION,
) -> None:
    """Draw counterfactuals of every scan, measure them, and write a page with its numbers.

    Measured are composition, reversibility, effectiveness and minimality, the prediction of follow-ups, realism, and,
    for simulated patients, the distance to the true counterfactual.
    """
    config = load_config(JudgeConfig, None, overrides or [])
    _check(scans, editors)
    make_folder(output.out)
    console = Console(stderr=output.as_json)
    with loading(console):
        from ld_common.release.release import read_release, release_editor
        from ld_evaluate.evaluation import Evaluation, evaluate_release

    names = editors.editor or [release_editor(read_release(release)).name]
    evaluation = Evaluation(release, scans.data, scans.reference, names, editors.num_seeds, editors.base, config)
    total = sum(editors.num_seeds if EDITORS.load(name).draws_noise() else 1 for name in names)
    with progress_bar(console, "judging", total) as advance:
        runs = evaluate_release(evaluation, lambda: advance(1))
    files = write_release_report(output.out, runs, runs[0]["release"], scans.data)
    if output.as_json:
        print_json({"runs": runs})
    for file in files:
        console.print(f"wrote {file}", soft_wrap=True)


def _check(scans: ScanSources, editors: Editors) -> None:
    """Refuse what is wrong without a look at the release; raises `ConfigError` or `RequestError`."""
    require(editors.num_seeds > 0, f"--num-seeds is {editors.num_seeds}: use 1 or more")
    for name in editors.editor or []:
        require(name in EDITORS, f"--editor {name}: {nearest(name, list(EDITORS))}")
    for option, path in (("--data", scans.data / SCANS), ("--reference", scans.reference)):
        if path is not None and not path.is_file():
            raise RequestError(f"{option}: there is no file '{path}'")


cli.command()(grouped(evaluate))


def make_folder(folder: Path) -> None:
    """Create the output folder; raises `RequestError` where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot write '{folder}' ({error.strerror}): choose another folder with --out") from error


def main() -> None:
    """Entry point of `ld-evaluate`."""
    run_cli(cli, renamed=RENAMED)


if __name__ == "__main__":
    main()
