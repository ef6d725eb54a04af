"""docs/reference/commands.md: every command with its arguments and options, from the Typer apps."""

from __future__ import annotations

import functools
import importlib
import tomllib
from collections.abc import Iterator
from pathlib import PurePath

import typer
from typer.main import get_command

from generators import HEADER, ROOT, cell, table

INTRODUCTION = """\
# Command lines

A command ends with exit code 0; with 1 if part of the work failed, such as a bad row of a batch or a failed check; and
with 2 and one line that says what was wrong and how to mend it. `KEY=VALUE` arguments replace values of the YAML file;
see [Configuration](configuration.md).

"""


def scripts() -> dict[str, str]:
    """The console scripts of `pyproject.toml`: command -> module."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return {name: target.partition(":")[0] for name, target in sorted(content["project"]["scripts"].items())}


def app_of(module: str) -> typer.Typer:
    """The Typer app that a script's module runs."""
    loaded = importlib.import_module(module)
    apps = {name: value for name, value in vars(loaded).items() if isinstance(value, typer.Typer)}
    return next((apps[name] for name in ("app", "cli") if name in apps), next(iter(apps.values())))


@functools.cache
def all_commands() -> dict[str, typer.core.TyperCommand]:
    """Every command by what one types, for example `ld-client audit verify`."""
    found = {}
    for name, module in scripts().items():
        found.update(_walk(name, get_command(app_of(module))))
    return found


def _walk(path: str, command: typer.core.TyperCommand) -> Iterator[tuple[str, typer.core.TyperCommand]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from _walk(f"{path} {name}", child)


def page() -> str:
    """The whole page."""
    parts = [HEADER, INTRODUCTION]
    for path, command in all_commands().items():
        parts.append(f"{'##' if ' ' not in path else '###'} `{path}`\n\n")
        if command.help:
            parts.append("\n\n".join(" ".join(part.split()) for part in command.help.split("\n\n")) + "\n\n")
        rows = [_row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
        rows = [row for row in rows if row[0] != "`--help`"]
        if rows:
            parts.append(table(["Argument or option", "Default", "Meaning"], rows) + "\n")
    return "".join(parts).rstrip() + "\n"


def _row(parameter: object) -> list[str]:
    options = [*getattr(parameter, "opts", []), *getattr(parameter, "secondary_opts", [])]
    is_option = any(option.startswith("-") for option in options)
    if is_option:
        name = " / ".join(f"`{option}`" for option in options)
    else:
        name = f"`{getattr(parameter, 'metavar', None) or options[0].upper()}`"
    default = getattr(parameter, "default", None)
    required = getattr(parameter, "required", False)
    plain = isinstance(default, (str, int, float, PurePath)) and not isinstance(default, bool) and str(default) != ""
    shown = "required" if required else f"`{default}`" if plain else ""
    return [name, shown, cell(getattr(parameter, "help", None) or "")]
