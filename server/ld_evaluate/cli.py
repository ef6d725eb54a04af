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
from ld_evaluate.files import ANSWERS, PERFECT, QUESTIONS, RULES, SCANS
from ld_evaluate.options import JudgeConfig
from ld_evaluate.report import write_release_report

RENAMED = {
    "--release": "RELEASE, the first argument",
    "--method": "--editor",
    "--seeds": "--num-seeds",
    "--config": "ld-benchmark STUDY --config",
}
"""Former options, and what took their place."""

TAKEN = (*RULES, PERFECT)
"""Names of rows that every page has."""

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class ScanSources:
    """What a release is judged on."""

    data: Annotated[Path, typer.Option(help="Folder with scans.csv: patient, input, and the modality's attributes.")]
    reference: Annotated[
        Path | None,
        typer.Option(help="Table of real scans of other patients: adds effectiveness, realism and minimality."),
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
class OtherMethods:
    """Methods of others, each a row beside the release's editors."""

    answers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="Folder with answers.csv: patient, every attribute of the answer, and file (.npy of the scan's shape, "
            "in its real values, or an image). questions.csv in the output folder lists what is asked. Repeatable.",
        ),
    ] = None
    callable: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=MODULE:FUNCTION",
            help="Python function of (pixels HxW float32, source attributes, target attributes) that returns pixels "
            "HxW. Repeatable.",
        ),
    ] = None


@dataclass(frozen=True)
class Output:
    """Where the results go."""

    out: Annotated[Path, typer.Option(help="Folder for the page and its numbers.")] = Path("evaluation")
    as_json: Json = False


def evaluate(
    release: Annotated[Path, typer.Argument(help="Folder of the release.")],
    scans: ScanSources,
    editors: Editors,
    others: OtherMethods,
    output: Output,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="cycles, cycled or predictor_steps."),
    ] = None,
    version: bool = VERSION,
) -> None:
    """Draw counterfactuals of every scan, measure them, and write a page with its numbers, and a row for each answer.

    Measured is what is written into the pixels of the scan's file: how much nearer it is to the truth than the unedited
    scan, and each patient's growth of every biomarker, beside the rules that need no network. The truth is the
    patient's later scan, and for simulated patients the true counterfactual. Besides: composition, reversibility,
    effectiveness, minimality and realism.
    """
    config = load_config(JudgeConfig, None, overrides or [])
    _check(scans, editors)
    folders = {name: Path(folder) for name, folder in _named("--answers", others.answers or []).items()}
    for name, folder in folders.items():
        if not (folder / ANSWERS).is_file():
            raise RequestError(f"--answers {name}: there is no file '{folder / ANSWERS}'")
    functions = _named("--callable", others.callable or [])
    for name in {*folders} & {*functions}:
        raise RequestError(f"--answers and --callable both name a method '{name}': give each its own name")
    make_folder(output.out)
    console = Console(stderr=output.as_json)
    with loading(console):
        from ld_common.release.release import read_release, release_editor
        from ld_evaluate.evaluation import Evaluation, evaluate_release
        from ld_evaluate.other_methods import write_questions

        names = editors.editor or [release_editor(read_release(release)).name]
        evaluation = Evaluation(
            release, scans.data, scans.reference, names, editors.num_seeds, editors.base, config, folders, functions
        )
        data = evaluation.read_scans()
    write_questions(output.out / QUESTIONS, data.modality, data.asked)
    total = sum(editors.num_seeds if EDITORS.load(name).draws_noise() else 1 for name in names)
    with progress_bar(console, "judging", total + len(folders) + len(functions)) as advance:
        runs = evaluate_release(evaluation, data, lambda: advance(1))
    files = write_release_report(output.out, runs, runs[0]["release"], scans.data, data.asked)
    if output.as_json:
        print_json({"runs": runs})
    for file in files:
        console.print(f"wrote {file}", soft_wrap=True)


def _named(option: str, values: list[str]) -> dict[str, str]:
    """`NAME=VALUE` by name; raises `RequestError` for another form, or a name that stands for two or for a rule."""
    named: dict[str, str] = {}
    for value in values:
        name, equals, content = value.partition("=")
        if not (name and equals and content):
            raise RequestError(f"{option} {value}: write NAME=VALUE, for example {option} mine=...")
        if name in named or name in EDITORS or name in TAKEN:
            raise RequestError(f"{option} {value}: the name '{name}' is taken: choose another")
        named[name] = content
    return named


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
