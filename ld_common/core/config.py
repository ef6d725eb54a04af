"""Reads YAML and `key=value` overrides into plain, checked dataclasses.

Range checks live in each dataclass's `__post_init__`; code past `load_config` never sees a `DictConfig`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ld_common.core.errors import ConfigError

T = TypeVar("T")
MAX_YAML_BYTES, MAX_YAML_NODES = 2**18, 2**17
"""PyYAML parses some 100 KB a second."""


def load_config(
    schema: type[T],
    path: Path | None = None,
    overrides: Sequence[str] = (),
    start: T | None = None,
    variants: Sequence[str] = (),
) -> T:
    """Read `path`, apply `overrides` such as `training.steps=20`, and return a checked `schema`.

    Args:
        schema: dataclass whose `__post_init__` checks ranges; its class variable `RENAMED` maps old keys to new ones.
            Its method `located`, if it has one, gets the folder of `path` and returns the config with its files there.
        path: YAML file, or None.
        overrides: `key=value`, with dots for nested keys.
        start: values of keys that neither file nor overrides give; by default the schema's.
        variants: sections whose options depend on their `name`; an override of the name replaces the file's section.

    Raises:
        ConfigError: unreadable YAML, an unknown key (with the nearest known one), a value of the wrong type or out of
            range.
    """
    try:
        layers: list[Any] = [_read_yaml(path)] if path is not None else []
        layers.append(OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides))))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"an override is not of the form key=value: {_one_line(error)}") from error
    for section in variants:
        _replace_variant(section, layers)
    unknown = [problem for layer in layers for problem in _unknown_keys(schema, layer)]
    if unknown:
        raise ConfigError("; ".join(unknown))
    config = from_mapping(schema, *([] if start is None else [to_mapping(start)]), *layers)
    located = getattr(config, "located", None)
    return config if path is None or located is None else typing.cast(T, located(path.resolve().parent))


def checked(schema: type[T], mapping: Mapping[str, Any], prefix: str = "") -> T:
    """A mapping as a checked `schema`; `prefix` is its position in the file, for messages.

    Raises:
        ConfigError: an unknown key (with the nearest known one), or a value that `from_mapping` refuses.
    """
    unknown = list(_unknown_keys(schema, mapping, prefix))
    if unknown:
        raise ConfigError("; ".join(unknown))
    return from_mapping(schema, dict(mapping))


def from_mapping(schema: type[T], *layers: Any) -> T:
    """Merge plain mappings over `schema`'s defaults, later ones last, into the checked dataclass.

    Raises:
        ConfigError: a value of the wrong type or out of range, or an interpolation (`${...}`).
    """
    if "${" in json.dumps(layers, default=str):
        raise ConfigError("a config value holds '${': interpolation is not supported, write the value itself")
    try:
        merged = OmegaConf.merge(_defaults(typing.cast(Any, schema)), *layers)
        return typing.cast(T, OmegaConf.to_object(merged))
    except ConfigError:
        raise
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        cause = error.__cause__
        raise cause if isinstance(cause, ConfigError) else ConfigError(_one_line(error)) from error


@functools.cache
def _defaults(schema: Any) -> DictConfig:
    """A schema's defaults, which `merge` copies; making them is most of the cost of `from_mapping`."""
    return typing.cast(DictConfig, OmegaConf.structured(schema))


def to_mapping(config: Any) -> dict[str, Any]:
    """A config dataclass as nested plain dicts and lists, ready for JSON or a message."""
    return dataclasses.asdict(config)


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def is_number(text: str) -> bool:
    """Whether `text` reads as a number, `nan` and `inf` among them."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint with the known word nearest to `word`, or all known words if none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def _replace_variant(section: str, layers: list[Any]) -> None:
    in_file, override = (layer.get(section, {}) for layer in (layers[0], layers[-1]))
    if not (isinstance(in_file, dict) and isinstance(override, dict)) or "name" not in in_file:
        return
    if override.get("name", in_file["name"]) != in_file["name"]:
        layers[0] = {key: value for key, value in layers[0].items() if key != section}


class _Loader(yaml.SafeLoader):
    """Counts what aliases stand for: a few lines of aliases of aliases stand for gigabytes."""

    def __init__(self, content: str) -> None:
        super().__init__(content)
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias = self.check_event(yaml.AliasEvent)
        node: Any = super().compose_node(parent, index)
        if alias and id(node) not in self._sizes:
            raise yaml.YAMLError("an alias stands in its own value")
        if not alias:
            values = () if isinstance(node, yaml.ScalarNode) else node.value
            parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in parts)
        if self._sizes[id(node)] > MAX_YAML_NODES:
            raise yaml.YAMLError(f"with its aliases it has more than {MAX_YAML_NODES} values")
        return node


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_YAML_BYTES + 1)
        if len(content) > MAX_YAML_BYTES:
            raise ConfigError(f"'{path}' has more than the {MAX_YAML_BYTES} bytes of a config that are read")
        data = yaml.load(content.decode(), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read config '{path}': {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read config '{path}': {_one_line(error)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date or number that is none, deep nesting
        raise ConfigError(f"'{path}' is not valid YAML: {_one_line(error)}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"'{path}' must hold keys and values, not a {type(data).__name__}")
    return data


def _unknown_keys(schema: Any, data: Any, prefix: str = "") -> Iterator[str]:
    if not (dataclasses.is_dataclass(schema) and isinstance(data, dict)):
        return
    hints = typing.get_type_hints(schema)
    known = [field.name for field in dataclasses.fields(schema)]
    for key, value in data.items():
        renamed = getattr(schema, "RENAMED", {})
        if key in renamed:
            yield f"config key '{prefix}{key}' is now called '{prefix}{renamed[key]}'"
        elif key not in known:
            yield f"unknown config key '{prefix}{key}': {nearest(str(key), known)}"
        else:
            hint = hints[key]
            if typing.get_origin(hint) is dict and isinstance(value, dict):
                for name, entry in value.items():
                    yield from _unknown_keys(typing.get_args(hint)[1], entry, f"{prefix}{key}.{name}.")
            elif typing.get_origin(hint) is list and isinstance(value, list):
                for number, entry in enumerate(value):
                    yield from _unknown_keys(typing.get_args(hint)[0], entry, f"{prefix}{key}.{number}.")
            else:
                yield from _unknown_keys(hint, value, f"{prefix}{key}.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
