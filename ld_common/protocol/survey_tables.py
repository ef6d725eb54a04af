"""Tables of a cohort survey for a terminal: both sides show the same."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ld_common.core.command import print_lines, printable
from ld_common.protocol.survey import CohortSurvey, SurveyTable

MOST_COLUMNS = 5
"""Cells of a table's last axis that stand side by side; more of them stand below each other."""


def show_tables(survey: CohortSurvey, cells: Sequence[Sequence[str]]) -> None:
    """Print each table of a survey, its last axis across where it is short.

    Rows of zeros are left out of tables with several axes, which have many.

    Args:
        survey: what was asked.
        cells: text of each cell, row by row, for each table.
    """
    console = Console()
    for table, texts in zip(survey.tables, cells, strict=True):
        print_lines(table.title)
        console.print(_terminal_table(survey, table, texts))


def _terminal_table(survey: CohortSurvey, table: SurveyTable, texts: Sequence[str]) -> Table:
    axes = [survey.by_name[name] for name in table.axes]
    across = axes[-1] if len(axes) > 1 and len(axes[-1].labels) <= MOST_COLUMNS else None
    down = axes if across is None else axes[:-1]
    names = [axis.title for axis in down]
    values = ["patients"] if across is None else [f"{across.title} {label}" for label in across.labels]
    shown = Table(*(Column(_text(name)) for name in names), *(Column(_text(name), justify="right") for name in values))
    width, before = len(values), [""] * len(down)
    for row, labels in enumerate(itertools.product(*(axis.labels for axis in down))):
        numbers = texts[row * width : (row + 1) * width]
        if len(axes) > 1 and set(numbers) == {"0"}:
            continue
        same = [list(labels[: place + 1]) == before[: place + 1] for place in range(len(down))]
        heads = ["" if repeated else label for label, repeated in zip(labels, same, strict=True)]
        before = list(labels)
        shown.add_row(*map(_text, [*heads, *numbers]))
    return shown


def _text(text: str) -> Text:
    return Text(printable(text))
