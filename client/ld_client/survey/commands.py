"""Commands of `ld-client survey`: join, answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ld_client.site_commands import SiteOptions
from ld_common.core.command import grouped, print_lines

if TYPE_CHECKING:
    from ld_client.survey.answering import SiteCounts

OUT = typer.Option(Path(), help="Folder for the file to send; the present one by default.")

survey_app = typer.Typer(
    no_args_is_help=True,
    help="Tell an engineer before a study how many patients there are: rounded, and only in a sum with other sites.",
)


@survey_app.command("join")
@grouped
def join(
    site: SiteOptions,
    survey: Path = typer.Argument(..., metavar="SURVEY", help="survey.json, as the engineer sent it."),
    out: Path = OUT,
) -> None:
    """Make this site's key for a survey and write NAME.joined.json for the engineer. Nothing is counted.

    Example: ld-client survey join survey.json --config site.yaml
    """
    from ld_client.survey.answering import join_survey
    from ld_common.protocol.survey import read_survey

    print_lines(*join_survey(site.load(), read_survey(survey), out))


@survey_app.command("answer")
@grouped
def answer(
    site: SiteOptions,
    roster: Path = typer.Argument(..., metavar="ROSTER", help="roster.json, as the engineer sent it."),
    fingerprint: str = typer.Option("", help="The roster's, compared by telephone with the other sites: SHA256:..."),
    out: Path = OUT,
    another: bool = typer.Option(False, "--another", help="Answer although this site has answered another survey."),
    yes: bool = typer.Option(False, "--yes", help="Answer without asking."),
) -> None:
    """Count the patients of the index, show what would leave, ask, and write NAME.answer.json for the engineer.

    Each number is rounded to a multiple of policy.count_step, then masked: the engineer reads the sum of all sites.

    Example: ld-client survey answer roster.json --config site.yaml --fingerprint SHA256:...
    """
    from ld_client.survey import answering
    from ld_common.protocol.survey import read_roster

    config, read = site.load(), read_roster(roster)

    def show(counts: SiteCounts) -> None:
        from ld_common.protocol.survey_tables import show_tables

        pairs = zip(counts.counted.tables, counts.leaves.tables, strict=True)
        show_tables(read.survey, [[_change(*cell) for cell in zip(*pair, strict=True)] for pair in pairs])
        print_lines(*_summary(counts, read.survey.sites))

    def confirm() -> bool:
        return yes or typer.confirm("Write the answer?")

    home = None if site.home is None else site.site_home
    record = answering.answer_survey(config, read, fingerprint, show, confirm, another=another, home=home)
    path = answering.write_answer(config, record, out)
    print_lines(f"wrote {path} of {record.answered}: send it to the engineer; this survey has no other answer")


def _summary(counts: SiteCounts, sites: tuple[str, ...]) -> list[str]:
    counted, leaves = counts.counted, counts.leaves
    exact = "policy.count_step is 1: the exact numbers enter the sum"
    rounded = f"policy.count_step is {leaves.step}: numbers are rounded, and fewer than {(leaves.step + 1) // 2} are 0"
    return [
        "counted here → enters the sum, under a mask:",
        f"patients {_change(counted.patients, leaves.patients)}, visits {_change(counted.visits, leaves.visits)}",
        exact if leaves.step == 1 else rounded,
        f"the engineer can read the sum over {', '.join(sites)} only; to find this site's part, every other site would "
        "have to help",
    ]


def _change(counted: int, leaves: int) -> str:
    return f"{counted} → {leaves}" if counted or leaves else "0"
