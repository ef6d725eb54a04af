"""Commands of `ld-server survey`: new, roster, sum."""

from __future__ import annotations

from pathlib import Path

import typer

from ld_common.core.command import Json, print_json, print_lines

FOLDER = typer.Argument(..., help="The survey's folder, made by ld-server survey new.")

survey_app = typer.Typer(
    no_args_is_help=True,
    help="Count the patients of several sites before a study: rounded, and added up without showing a single site's.",
)


@survey_app.command("new")
def new(
    questions: Path = typer.Argument(..., help="YAML file: modality, and optionally bins and tables."),
    site: list[str] = typer.Option(..., "--site", help="A site to ask; repeat it for each of three or more."),
    out: Path = typer.Option(..., help="Folder to make for the survey's files."),
    settings: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Replace values of the YAML file."),
) -> None:
    """Write survey.json, which asks the sites for tables of patients.

    Example: ld-server survey new QUESTIONS.yaml --site aster --site birch --site cedar --out survey
    """
    from ld_common.protocol.survey_sum import vector_length
    from ld_server.survey.questions import load_questions, make_survey
    from ld_server.survey.survey_folder import SurveyFolder

    survey = make_survey(*load_questions(questions, settings or []), site)
    folder = SurveyFolder(out)
    folder.write_survey(survey)
    print_lines(*(f"{table.title}: {survey.cells(table)} cells" for table in survey.tables))
    print_lines(f"each site will send {vector_length(survey)} masked numbers; fine tables lose patients to rounding")
    print_lines(f"wrote {folder.survey_file}: send it to {', '.join(survey.sites)}, for ld-client survey join")


@survey_app.command("roster")
def roster(folder: Path = FOLDER) -> None:
    """Collect the sites' NAME.joined.json into roster.json, and print its fingerprint."""
    from ld_server.survey.survey_folder import SurveyFolder

    survey = SurveyFolder(folder)
    made = survey.make_roster()
    print_lines(
        f"wrote {survey.roster_file}: send it to {', '.join(made.survey.sites)}, for ld-client survey answer",
        f"its fingerprint: {made.fingerprint}",
        "the sites' data managers compare it with each other by telephone: only they can tell that no key was replaced",
    )


@survey_app.command("sum")
def add_up(folder: Path = FOLDER, as_json: Json = False) -> None:
    """Add up the sites' NAME.answer.json, write counts.json, and print the tables. Every site must have answered."""
    from ld_common.protocol.survey_tables import show_tables
    from ld_server.survey.survey_folder import SurveyFolder, counts_content, counts_lines

    survey = SurveyFolder(folder)
    made, numbers = survey.sum()
    if as_json:
        return print_json(counts_content(made, numbers))
    print_lines(*counts_lines(made, numbers))
    show_tables(made.survey, [[str(count) for count in cells] for cells in numbers.tables])
    return print_lines(f"wrote {survey.counts_file}")
