"""`key=value` for several configs at once: each goes to the first config that has the key."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ld_common.core.errors import ConfigError


def split_overrides(
    overrides: Sequence[str], schemas: Mapping[str, type], removed: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """Assign each override to a config.

    Args:
        overrides: `key=value`, as on a command line.
        schemas: the config dataclasses by name, in order of precedence.
        removed: keys of earlier versions, and what to do instead.

    Raises:
        ConfigError: an override without a value, or a key that no config has; the message names the nearest key and
            its config.
    """
    assigned: dict[str, list[str]] = {name: [] for name in schemas}
    for override in overrides:
        key, equals, _ = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"'{override}' is not of the form key=value")
        if key in (removed or {}):
            raise ConfigError(f"key '{key}' is gone: {(removed or {})[key]}")
        assigned[_owner(key, schemas)].append(override)
    return assigned


def _owner(key: str, schemas: Mapping[str, type]) -> str:
    parts = key.split(".")
    for name, schema in schemas.items():
        if _accepts(schema, parts):
            return name
    for name, schema in schemas.items():
        new = _renamed(schema, parts)
        if new:
            raise ConfigError(f"key '{key}' is now called '{new}' ({name})")
    raise ConfigError(f"unknown key '{key}': {_suggestion(key, schemas)}")


def _accepts(hint: Any, parts: Sequence[str]) -> bool:
    """Whether a value of this type has a part at that path."""
    if not parts:
        return True
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        names = [field.name for field in dataclasses.fields(hint)]
        return parts[0] in names and _accepts(hints[parts[0]], parts[1:])
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (dict, list):
        return _accepts(arguments[-1], parts[1:])
    return hint is Any


def _renamed(schema: Any, parts: Sequence[str], prefix: str = "") -> str:
    """The new name of a key of an earlier version; empty where there is none."""
    if not dataclasses.is_dataclass(schema) or not parts:
        return ""
    renamed: Mapping[str, str] = getattr(schema, "RENAMED", {})
    if parts[0] in renamed:
        return ".".join([*prefix.split(".")[:-1], renamed[parts[0]], *parts[1:]])
    hint = typing.get_type_hints(schema).get(parts[0])
    return _renamed(hint, parts[1:], f"{prefix}{parts[0]}.")


def _suggestion(key: str, schemas: Mapping[str, type]) -> str:
    owners = {path: name for name, schema in reversed(list(schemas.items())) for path in _paths(schema)}
    last = key.rpartition(".")[2]
    exact = [path for path in owners if path.rpartition(".")[2] == last]
    close = difflib.get_close_matches(key, exact or owners, n=1, cutoff=0.0 if exact else 0.5)
    if not close:
        by_last = {path.rpartition(".")[2]: path for path in owners}
        close = [by_last[word] for word in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    if close:
        return f"did you mean {close[0]} ({owners[close[0]]})?"
    sections = "; ".join(
        f"{name}: {', '.join(field.name for field in dataclasses.fields(schema))}" for name, schema in schemas.items()
    )
    return f"known keys: {sections}"


def _paths(schema: Any, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _paths(hints[field.name], f"{prefix}{field.name}.")
