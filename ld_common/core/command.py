"""Shared parts of the command lines: option groups, progress bars, JSON, and errors as one line with exit code 2."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ld_common.core.errors import ConfigError, LdError
from ld_common.core.version import installed_version

TRUST_HELP = "The study's public key, or a file or kit.json with it; remembered after the first valid release."
HOST_HELP = "Address to listen on. Any other than a loopback address lets other machines in."
UNSIGNED_HELP = "Accept a release without a signature, such as one of a simulation."


def _print_version(wanted: bool) -> None:
    if wanted:
        print(installed_version())
        raise typer.Exit


VERSION = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
"""An option of an app's callback."""
Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of text.")]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a Typer command take dataclasses of options as parameters.

    Each field of such a dataclass becomes an option of the command; it is annotated as
    `Annotated[type, typer.Option(...)]`.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if dataclasses.is_dataclass(hint):
            groups[parameter.name] = hint
            parameters += _field_parameters(hint)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hint))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _field_parameters(group: Any) -> Iterator[inspect.Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
        )


@contextmanager
def progress_bar(console: Console, title: str, total: int, transient: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar with an ETA; yields a function that advances it by a number of steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=transient) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda done: progress.advance(bar, done)


@contextmanager
def stage_bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with an ETA for each stage; yields a function of the stage, the steps done and all steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance


@contextmanager
def loading(console: Console) -> Iterator[None]:
    """A status line while the body imports the model libraries, which takes seconds."""
    with console.status("loading the model libraries"):
        import ld_common.core.offline  # noqa: F401  (before any model library)

        yield


def printable(line: str) -> str:
    """A line with escapes for characters that are not printable, so that text of others cannot move the cursor."""
    return "".join(sign if sign.isprintable() or sign == "\t" else repr(sign)[1:-1] for sign in line)


def print_lines(*lines: str) -> None:
    """Print lines as they are, without markup or wrapping."""
    for line in lines:
        Console().print(printable(line), soft_wrap=True, highlight=False, markup=False, emoji=False)


def print_json(content: Any) -> None:
    """Print plain data or a dataclass as JSON."""
    plain = dataclasses.asdict(content) if dataclasses.is_dataclass(content) else content  # type: ignore[arg-type]
    print(json.dumps(plain, indent=2, default=str))


def run_cli(
    app: typer.Typer, arguments: Sequence[str] | None = None, renamed: Mapping[str, str] | None = None
) -> NoReturn:
    """Run `app` and leave the process.

    Exit codes: 0 success, 2 an `LdError` (printed as `error: ...`) or a wrong command line, 130 interrupted, 143
    terminated.

    Args:
        app: the command line.
        arguments: the process's own by default.
        renamed: former names of commands and options (`--choice`), each with the present one; a former name is refused.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends child processes on the way out
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _refuse_renamed(given, renamed or {})
        code = app(args=given, standalone_mode=True)
    except LdError as error:
        code = _fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        code = _fail(f"cannot use '{os.fsdecode(error.filename)}': {error.strerror or error}")
    sys.exit(code)


def _refuse_renamed(given: Sequence[str], renamed: Mapping[str, str]) -> None:
    for place, argument in enumerate(given):
        name = argument.partition("=")[0]
        if argument == "--":
            return
        if name in renamed and (name.startswith("-") or place == 0):
            kind = "option" if name.startswith("-") else "command"
            raise ConfigError(f"{kind} '{name}' is now called '{renamed[name]}'")


def _fail(message: str) -> int:
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2
