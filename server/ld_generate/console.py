"""Where progress, notes and warnings go; results go to standard output."""

from __future__ import annotations

from rich.console import Console

status = Console(stderr=True)


def print_note(line: str) -> None:
    """Print one line to standard error, as it is."""
    status.print(line, soft_wrap=True, highlight=False, markup=False)
