"""docs/reference/api.md: every public name of `ld_common`, with its signature and docstring."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

from generators import HEADER

INTRODUCTION = """\
# Python API

Everything on this page is imported from `ld_common`. The names are loaded when they are first used, so
`import ld_common` costs nothing. The [tutorial](../tutorial.md) uses them from a folder of scans to a figure.

"""
SHOWN = ("__init__", "__call__")


def page() -> str:
    """The whole page."""
    package = importlib.import_module("ld_common")
    names = sorted(getattr(package, "__all__", []), key=str.lower)
    return "".join([HEADER, INTRODUCTION, *(_entry(name, getattr(package, name)) for name in names)]).rstrip() + "\n"


def _entry(name: str, value: Any) -> str:
    title = f"## `{name}`\n\n"
    if isinstance(value, ModuleType):
        return title + _module(value)
    if inspect.isclass(value) and value.__module__.startswith("ld_"):
        return title + _class(_definition(value))
    if inspect.isfunction(value):
        return title + _function(_definition(value))
    return title + f"An instance of `{type(value).__name__}`. {_constant_doc(name, value)}\n\n"


def _module(module: ModuleType) -> str:
    public = getattr(module, "__all__", [])
    members = ", ".join(f"`{module.__name__}.{name}`" for name in public)
    return f"Module `{module.__name__}`. {(module.__doc__ or '').strip()}\n\n" + (
        f"Names: {members}.\n\n" if public else ""
    )


def _definition(value: Any) -> Any:
    """The class's or function's definition in its module's source."""
    tree = ast.parse(Path(inspect.getsourcefile(value) or "").read_text(encoding="utf-8"))
    return next(node for node in tree.body if getattr(node, "name", "") == value.__name__)


def _class(node: ast.ClassDef) -> str:
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    parts = [f"```python\nclass {node.name}{f'({bases})' if bases else ''}\n```\n\n", _doc(node)]
    fields = []
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and not ast.unparse(statement.target).startswith("_"):
            doc = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                doc = f": {' '.join(str(following.value.value).split())}"
            kind = ast.unparse(statement.annotation)
            if not kind.startswith("ClassVar"):
                default = f" = {ast.unparse(statement.value)}" if statement.value is not None else ""
                fields.append(f"- `{ast.unparse(statement.target)}: {kind}{default}`{doc}\n")
    parts += [*fields, "\n"] if fields else []
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and (not method.name.startswith("_") or method.name in SHOWN):
            parts.append(f"### `{node.name}.{method.name}`\n\n" + _function(method))
    return "".join(parts)


def _function(node: ast.FunctionDef) -> str:
    marks = "".join(f"@{ast.unparse(mark)}\n" for mark in node.decorator_list)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    arguments = _arguments(node.args)
    line = f"{node.name}({', '.join(arguments)}){returns}"
    if len(line) > 100:
        line = f"{node.name}(\n{''.join(f'    {argument},{chr(10)}' for argument in arguments)}){returns}"
    return f"```python\n{marks}{line}\n```\n\n" + _doc(node)


def _arguments(arguments: ast.arguments) -> list[str]:
    """A function's arguments, with spaces around the default of an annotated one."""
    parts, depth, current = [], 0, ""
    for letter in ast.unparse(arguments):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append(current.strip())
            current = ""
        elif letter == "=" and not depth and ":" in current:
            current += " = "
        else:
            current += letter
    return [*parts, current.strip()] if current.strip() else parts


def _doc(node: Any) -> str:
    """The docstring, its sections of arguments and errors as lists."""
    lines, result, section = (ast.get_docstring(node) or "").splitlines(), [], False
    for line in lines:
        if line.strip() in ("Args:", "Raises:", "Returns:", "Yields:"):
            section = True
            result.append(f"**{line.strip()[:-1]}**\n")
        elif section and line.startswith("    ") and not line.startswith("     "):
            name, colon, rest = line.strip().partition(": ")
            result.append(f"- `{name}`: {rest}" if colon and " " not in name else f"- {line.strip()}")
        elif section and line.startswith("     "):
            result.append(f"  {line.strip()}")
        else:
            section = section and bool(line.startswith(" ") or not line)
            result.append(line)
    return textwrap.dedent("\n".join(result)).strip() + "\n\n" if result else ""


def _constant_doc(name: str, value: Any) -> str:
    """What stands below a constant's definition, found in the registry modules by its name."""
    for module in ("ld_common.adapters.registry", "ld_common.editing.registry", "ld_common.metrics.registry"):
        loaded = importlib.import_module(module)
        if getattr(loaded, name, None) is not value:
            continue
        body = ast.parse(Path(loaded.__file__ or "").read_text(encoding="utf-8")).body
        for statement, following in itertools.pairwise(body):
            named = isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == name
            if named and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                return " ".join(str(following.value.value).split())
    return ""
