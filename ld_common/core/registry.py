"""Tables of named classes: ours, those of installed packages, and those that a program registers itself.

A table holds import paths, so reading it imports no algorithm. Another package adds a class through an entry point of
the table's group, for example in its `pyproject.toml`:

    [project.entry-points."latent_drift.editors"]
    my_editor = "my_package.editing:MyEditor"

Simulations and `ld-generate` load any installed entry point. A site of a deployed study calls `Registry.allow` first.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Generic, TypeVar, cast

from ld_common.core.config import nearest
from ld_common.core.errors import ConfigError

T = TypeVar("T")
NAME = re.compile(r"[a-z][a-z0-9_]*")


class Registry(Generic[T]):
    """Classes or functions of one kind, by the name that configs and command lines use."""

    allowed: ClassVar[frozenset[str] | None] = None
    """Distributions whose entry points this process may load, by normalized name; None for all. Set by `allow`."""

    @staticmethod
    def allow(packages: Collection[str] | None) -> None:
        """Limit all tables of this process to the entry points of these distributions; None lifts the limit."""
        Registry.allowed = None if packages is None else frozenset(map(normalized, packages))

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str], renamed: Mapping[str, str] | None = None):
        """Make a table.

        Args:
            kind: what an entry is called in messages, for example `editor`.
            group: entry-point group in which other packages list theirs.
            builtin: our own entries, `"module:attribute"` by name.
            renamed: names of earlier versions and what they are called now; they are refused with the new name.
        """
        self.kind, self.group = kind, group
        self._paths, self._renamed = dict(builtin), dict(renamed or {})
        self._registered: dict[str, T] = {}

    def __iter__(self) -> Iterator[str]:
        """All names: ours in their order, then those of other packages and of this program."""
        return iter(list(dict.fromkeys([*self._paths, *self._foreign(), *self._registered])))

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def builtin_modules(self) -> set[str]:
        """Names of the modules that hold our own entries."""
        return {path.partition(":")[0] for path in self._paths.values()}

    def load(self, name: str) -> T:
        """The entry of that name, imported when it is first asked for.

        Raises:
            ConfigError: no such name, or a package's entry that cannot be imported.
        """
        if name in self._registered:
            return self._registered[name]
        if name in self._renamed:
            raise ConfigError(f"{self.kind} '{name}' is now called '{self._renamed[name]}'")
        if name in self._paths:
            module, _, attribute = self._paths[name].partition(":")
            return cast(T, getattr(importlib.import_module(module), attribute))
        foreign = self._foreign()
        if name not in foreign:
            self._refuse_unlisted(name)
            raise ConfigError(f"unknown {self.kind} '{name}': {nearest(name, list(self))}")
        try:
            return cast(T, foreign[name].load())
        except Exception as error:  # whatever a foreign module raises while it is imported
            raise ConfigError(
                f"{self.kind} '{name}' of package {_package(foreign[name])} fails to load: {error}"
            ) from error

    def register(self, name: str, entry: T) -> T:
        """Add an entry for this process, as a notebook or a test does; returns it.

        Raises:
            ConfigError: a name that is taken, or is no lower-case identifier.
        """
        if not NAME.fullmatch(name):
            raise ConfigError(f"{self.kind} name '{name}': use lower-case letters, digits and underscores")
        if name in self:
            raise ConfigError(f"{self.kind} '{name}' exists already")
        self._registered[name] = entry
        return entry

    def unregister(self, name: str) -> None:
        """Remove an entry that `register` added."""
        self._registered.pop(name, None)

    def package_of(self, name: str) -> str | None:
        """Distribution that brings an entry; None for ours and for registered ones."""
        foreign = self._foreign()
        return _package(foreign[name]) if name in foreign and name not in self._registered else None

    def _foreign(self) -> dict[str, EntryPoint]:
        """Entry points of other packages that may be loaded; one that takes a name of ours is ignored."""
        allowed = Registry.allowed
        return {
            name: point
            for name, point in self._installed().items()
            if allowed is None or normalized(_package(point)) in allowed
        }

    def _installed(self) -> dict[str, EntryPoint]:
        points = _entry_points(self.group, tuple(sys.path))
        return {point.name: point for point in points if point.name not in self._paths and NAME.fullmatch(point.name)}

    def _refuse_unlisted(self, name: str) -> None:
        point = self._installed().get(name)
        if point is not None:
            raise ConfigError(
                f"{self.kind} '{name}' comes from package '{_package(point)}', which the study does not list: add it "
                "to the study's packages"
            )


@functools.lru_cache(maxsize=64)
def _entry_points(group: str, search_path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Entry points of the distributions on `search_path`, read once: a search opens the metadata of every package."""
    return tuple(entry_points(group=group))


def normalized(package: str) -> str:
    """A distribution's name as PEP 503 compares names."""
    return re.sub(r"[-_.]+", "-", package).lower()


def _package(point: EntryPoint) -> str:
    dist: Any = point.dist
    return "unknown" if dist is None else str(dist.metadata["Name"])
