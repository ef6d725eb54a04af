"""What command lines share: a bar, and an end where a user's error is one line on stderr and exit code 2."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ld_common.core.errors import LdError

TRUST_HELP = "The study's public key, or a file or kit.json with it; remembered once a release of it held."
UNSIGNED_HELP = "Take a release that nobody signed, such as a simulation's."


@contextmanager
def progress_bar(console: Console, title: str, total: int, transient: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar with an ETA; yields the function that moves it by a number of steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=transient) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda done: progress.advance(bar, done)


@contextmanager
def loading(console: Console) -> Iterator[None]:
    """A line on a terminal while a command imports the model libraries, which takes seconds; do that in its body."""
    with console.status("loading the model libraries"):
        import ld_common.core.offline  # noqa: F401  (before any model library)

        yield


def visible(line: str) -> str:
    """A line in which each character that is not printable stands as its escape: others' words cannot move a cursor."""
    return "".join(sign if sign.isprintable() or sign == "\t" else repr(sign)[1:-1] for sign in line)


def run_cli(app: typer.Typer, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `app` on `arguments` (the process's own by default) and leave the process.

    Exit codes: 0 done, 2 an `LdError` (printed as `error: ...`) or a wrong command line, 130 interrupted, 143 told
    to end.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended on the way out
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=True)
    except LdError as error:
        print(f"error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
        code = 2
    sys.exit(code)
