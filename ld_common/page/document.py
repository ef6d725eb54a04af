"""A page's content as one HTML document that needs no other file; all text of others is escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape

from ld_common.core.version import installed_version
from ld_common.page.content import (
    Cell,
    Curves,
    DataTable,
    Facts,
    Marked,
    Meter,
    PageContent,
    PageSection,
    Part,
    Sentence,
)
from ld_common.page.figure import figure
from ld_common.page.style import CSS, SCRIPT

REFRESH_SECONDS = 5
SHORT = 18
"""Characters of a cell that stays on one line where there is room, such as a time."""
MARKS = ("good", "warn", "bad", "plain")


def _source(text: str) -> str:
    """The text as a source of a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; style-src {_source(CSS)}; script-src {_source(SCRIPT)}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page's own style and script run, and nothing else."""


def document(content: PageContent) -> str:
    """The whole HTML; the same content gives the same text."""
    sections = "".join(map(_section, content.sections))
    links = "".join(f'<li><a href="#{part.anchor}">{escape(part.title)}</a></li>' for part in content.sections)
    notices = "".join(
        f'<p class="notice {_mark(notice.mark)}" role="note">{escape(notice.text)}</p>' for notice in content.notices
    )
    title = f"{content.state.text} · {content.title}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{CSS}</style></head>"
        f'<body data-refresh="{REFRESH_SECONDS}"><a class="skip" href="#content">Skip to the content</a>'
        f'<main id="content" tabindex="-1"><h1>{escape(content.title)}</h1><p class="about">{escape(content.about)}</p>'
        f'<p class="state {_mark(content.state.mark)}">{escape(content.state.text)}</p>{notices}'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>{sections}</main>'
        '<p class="unseen" role="status" id="news"></p>'
        '<footer><span id="told">Shown as it was when the page was opened.</span> '
        f"Nothing can be changed here. Research software, version {escape(installed_version())}.</footer>"
        f"<script>{SCRIPT}</script></body></html>"
    )


def _section(section: PageSection) -> str:
    curves = [part for part in section.parts if isinstance(part, Curves)]
    figures = "".join(map(figure, sorted(curves, key=lambda part: not any(curve.points for curve in part.curves))))
    others = "".join(_part(part) for part in section.parts if not isinstance(part, Curves))
    shown = f'<div class="figures">{figures}</div>' if figures else ""
    return (
        f'<section aria-labelledby="{section.anchor}"><h2 id="{section.anchor}">{escape(section.title)}</h2>'
        f"{shown}{others}</section>"
    )


def _part(part: Part) -> str:
    if isinstance(part, Facts):
        return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{_cell(value)}</dd>' for name, value in part.facts)}</dl>"
    if isinstance(part, DataTable):
        return _table(part)
    if isinstance(part, Meter):
        return _meter(part)
    if isinstance(part, Sentence):
        return f"<p>{escape(part.text)}</p>"
    return figure(part)


def _table(table: DataTable) -> str:
    """A table whose rows become blocks on a narrow screen; the roles stay what they are then."""
    if not table.rows:
        return f'<p class="empty">{escape(table.empty)}</p>'
    heads = [name.removeprefix("#") for name in table.columns]
    numeric = [' class="n"' if name.startswith("#") else "" for name in table.columns]
    head = "".join(
        f'<th scope="col" role="columnheader"{kind}>{escape(name)}</th>'
        for name, kind in zip(heads, numeric, strict=True)
    )
    body = "".join(f'<tr role="row">{_row(row, heads, numeric)}</tr>' for row in table.rows)
    return (
        f'<table role="table"><caption>{escape(table.caption)}</caption><thead role="rowgroup"><tr role="row">{head}'
        f'</tr></thead><tbody role="rowgroup">{body}</tbody></table>'
    )


def _row(row: Sequence[Cell], heads: Sequence[str], numeric: Sequence[str]) -> str:
    cells = []
    for place, (cell, head, kind) in enumerate(zip(row, heads, numeric, strict=True)):
        name = escape(head)
        if place == 0:
            cells.append(f'<th scope="row" role="rowheader" data-head="{name}"{kind}>{_cell(cell)}</th>')
        else:
            cells.append(f'<td role="cell" data-head="{name}"{kind}>{_cell(cell)}</td>')
    return "".join(cells)


def _cell(cell: Cell) -> str:
    if isinstance(cell, Marked):
        return f'<span class="{_mark(cell.mark)}">{escape(cell.text)}</span>'
    kind = ' class="short"' if len(cell) <= SHORT else ""
    return f"<span{kind}>{escape(cell)}</span>" if cell else '<span class="nothing"></span>'


def _meter(meter: Meter) -> str:
    share = min(1.0, meter.value / meter.whole) if meter.whole > 0 else 1.0
    full = " full" if share >= 1 else ""
    return (
        f'<div class="meter{full}"><b>{escape(meter.name)}</b><svg viewBox="0 0 100 10" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(meter.text)}"><rect class="whole" width="100" height="10"/>'
        f'<rect class="used" width="{100 * share:.2f}" height="10"/></svg><span>{escape(meter.text)}</span></div>'
    )


def _mark(mark: str) -> str:
    return mark if mark in MARKS else "plain"
