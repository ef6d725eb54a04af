"""What a read-only page shows, as plain data: facts, tables, curves. `ld_common.page.document` makes HTML of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Marked:
    """A cell or fact that is marked as `good`, `warn` or `bad`, by its words and by color."""

    text: str
    mark: str


Cell = str | Marked


@dataclass(frozen=True)
class Facts:
    """Names with their values."""

    facts: Sequence[tuple[str, Cell]]


@dataclass(frozen=True)
class DataTable:
    """A table; the first column names the row."""

    caption: str
    columns: Sequence[str]
    """Their heads; those that begin with `#` hold numbers, and are shown without the sign."""
    rows: Sequence[Sequence[Cell]]
    empty: str
    """Shown in place of a table without rows."""


@dataclass(frozen=True)
class Curve:
    """One line of a figure."""

    name: str
    points: Sequence[tuple[int, float]]
    """Round and value, by round."""
    main: bool = False
    """Drawn thicker, in the color of the text."""


@dataclass(frozen=True)
class Curves:
    """A figure of values over the rounds."""

    title: str
    curves: Sequence[Curve]
    empty: str
    """Shown in place of a figure without a value."""


@dataclass(frozen=True)
class Meter:
    """How much of a whole is used."""

    name: str
    value: float
    whole: float
    text: str


@dataclass(frozen=True)
class Sentence:
    """A paragraph."""

    text: str


Part = Facts | DataTable | Curves | Meter | Sentence


@dataclass(frozen=True)
class PageSection:
    """A heading with its parts."""

    title: str
    parts: Sequence[Part]

    @property
    def anchor(self) -> str:
        """Its place in the page's address."""
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class PageContent:
    """A whole page."""

    title: str
    about: str
    """One line under the title."""
    state: Marked
    """The most important thing to know, in a few words."""
    sections: Sequence[PageSection]
    notices: Sequence[Marked] = field(default_factory=list)
    """What needs a person's attention."""


def bytes_text(count: float) -> str:
    """A number of bytes with a decimal unit."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"


def time_text(time: str) -> str:
    """`2026-07-01T09:30:00+00:00` as `2026-07-01 09:30`; nothing for an absent time."""
    return time[:16].replace("T", " ")


def number_text(value: float | None) -> str:
    """A number with four significant digits; a dash for an absent one."""
    return "–" if value is None else f"{value:.4g}"
