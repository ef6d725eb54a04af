"""`--version` for every command, without a parameter of its own in each function."""

from __future__ import annotations

import contextlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click
from typer.core import TyperCommand, TyperGroup

DISTRIBUTIONS = ("latent-drift-federation", "latent-drift-client", "latent-drift-generate")
"""Any of them may hold this software: the whole of it, a hospital's wheel, or what draws and judges."""


def software_version() -> str:
    """This software's version; `unknown` where it runs from a folder that no package was installed from."""
    for name in DISTRIBUTIONS:
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return "unknown"


def version_option() -> click.Option:
    """`--version`: print the command's name and version, and leave."""

    def show(context: click.Context, _: click.Parameter, value: bool) -> None:
        if value and not context.resilient_parsing:
            click.echo(f"{context.find_root().info_name} {software_version()}")
            context.exit()

    return click.Option(
        ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=show, help="Print the version."
    )


class VersionedCommand(TyperCommand):
    """A command with `--version`: `@app.command(cls=VersionedCommand)`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(version_option())


class VersionedGroup(TyperGroup):
    """A group of commands with `--version`: `Typer(cls=VersionedGroup)`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(version_option())
