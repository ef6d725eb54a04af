"""Commands whose parameters are dataclasses of options, and one line for an option that has another name now.

Typer reads one function parameter an option. Commands here take a few dataclasses instead; `add_command` shows Typer
their fields.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import typer
from click import Context, NoSuchOption
from typer.core import TyperCommand, TyperGroup

from ld_common.core.errors import ConfigError

RENAMED = {
    "--given": "--source",
    "--set": "--target",
    "--strength": "--guidance-scale",
    "--depth": "--noise-fraction",
    "--method": "--editor",
    "--mask": "--preserve-mask",
    "--mark": "--watermark",
    "--released": "--burned-in-text-checked",
    "--seeds": "--num-seeds",
}
SUBCOMMANDS = {
    "--release": "ld-generate edit RELEASE",
    "--batch": "ld-generate batch RELEASE TABLE",
    "--volume": "ld-generate volume RELEASE",
    "--trajectory": "ld-generate sweep RELEASE age=60:90:5",
}
"""Options of earlier versions and the commands that take their place."""


def refuse_renamed(option: str) -> None:
    """Raise `ConfigError` for an option of an earlier version; it names the new one."""
    if option in RENAMED:
        raise ConfigError(f"{option} is now called {RENAMED[option]}")
    if option in SUBCOMMANDS:
        raise ConfigError(f"{option} is no longer an option: use '{SUBCOMMANDS[option]}'")


class Command(TyperCommand):
    """A command that names the new option when it is given an old one."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """As click; raises `ConfigError` for an option of an earlier version."""
        try:
            return super().parse_args(ctx, args)
        except NoSuchOption as error:
            refuse_renamed(error.option_name)
            raise


class Group(TyperGroup):
    """The same for options that stand before a command, or without one."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """As click; raises `ConfigError` for an option of an earlier version."""
        try:
            return super().parse_args(ctx, args)
        except NoSuchOption as error:
            option = error.option_name
            if option in RENAMED:
                raise ConfigError(
                    f"{option} is now called {RENAMED[option]}, and a command comes first: ld-generate --help"
                ) from error
            refuse_renamed(option)
            raise


def add_command(app: typer.Typer, name: str, function: Callable[..., None]) -> None:
    """Add a command to an app; each parameter of `function` is a dataclass of options, or one option."""
    app.command(name, cls=Command)(expand_groups(function))


def expand_groups(function: Callable[..., None]) -> Callable[..., None]:
    """The function with the fields of its dataclass parameters as keyword parameters of its own."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in groups:
            parameters += _parameters_of(groups[name])
        else:
            parameters.append(
                parameter.replace(
                    kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name], default=parameter.default
                )
            )

    def command(**values: Any) -> None:
        arguments = {
            name: group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        function(**arguments, **values)

    command.__doc__ = function.__doc__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _parameters_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[field.name], default=_default(field)
        )
        for field in dataclasses.fields(group)
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
