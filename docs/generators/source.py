"""The packages' classes, read from their source without importing it."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from generators import ROOT

FOLDERS = ("ld_common", "server", "client", "simulations/ld_simulations")


@dataclass(frozen=True)
class Field:
    """A field of a dataclass."""

    name: str
    type: str
    default: str | None
    """Source of the default; None for a required field."""
    doc: str


@dataclass(frozen=True)
class ClassSource:
    """A class as its module writes it."""

    node: ast.ClassDef
    module: ast.Module
    path: Path

    @property
    def doc(self) -> str:
        """The class's docstring, dedented; empty where it has none."""
        return ast.get_docstring(self.node) or ""

    @property
    def bases(self) -> list[str]:
        """Names of its bases."""
        return [base.id for base in self.node.bases if isinstance(base, ast.Name)]

    @property
    def fields(self) -> list[Field]:
        """Its own fields, without class variables."""
        body, fields = self.node.body, []
        for statement, following in zip(body, [*body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            kind = ast.unparse(statement.annotation)
            if kind.startswith("ClassVar"):
                continue
            doc = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                doc = str(following.value.value)
            fields.append(Field(statement.target.id, kind, self._default(statement.value), doc))
        return fields

    def _default(self, value: ast.expr | None) -> str | None:
        if value is None or (isinstance(value, ast.Name) and value.id == "MISSING"):
            return None
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
            factory = next((word.value for word in value.keywords if word.arg == "default_factory"), None)
            if isinstance(factory, ast.Lambda):
                return self._default(factory.body)
            return {"list": "[]", "dict": "{}"}.get(ast.unparse(factory), "") if factory else ""
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "list" and isinstance(value.args[0], ast.Name):
            return self._constant(value.args[0].id)
        if isinstance(value, ast.Call):
            return ""
        return self._constant(value.id) if isinstance(value, ast.Name) else ast.unparse(value)

    def _constant(self, name: str) -> str:
        for statement in self.module.body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
                return ast.unparse(statement.value)
        return name


@functools.cache
def modules() -> dict[Path, ast.Module]:
    """Every module of the packages, parsed."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths if "build" not in path.parts}


@functools.cache
def classes() -> dict[str, ClassSource]:
    """Every top-level class by its name."""
    return {
        node.name: ClassSource(node, module, path)
        for path, module in modules().items()
        for node in module.body
        if isinstance(node, ast.ClassDef)
    }


def subclasses(name: str) -> list[str]:
    """The concrete classes that derive from a class, directly or not, in the order of their modules."""
    direct = [child for child, source in classes().items() if name in source.bases]
    return [child for parent in direct for child in (parent, *subclasses(parent))]


def loaded_schemas() -> Iterator[str]:
    """Names of the dataclasses that a `load_config(NAME, ...)` reads from YAML."""
    for module in modules().values():
        for node in ast.walk(module):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "load_config" and node.args:
                first = node.args[0]
                if isinstance(first, ast.Name) and first.id in classes():
                    yield first.id
