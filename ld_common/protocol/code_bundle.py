"""The code that a study runs at its sites: the ClientApp and every module of ours that it can import.

Adding an editor, a metric or a command must not change the code that hospitals approved, so the bundle is the import
closure of `CLIENT_APP` and nothing more. Imports are read from the source, without running it.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from ld_common.adapters.registry import ADAPTERS

PACKAGES = ("ld_common", "ld_client")
CLIENT_APP = "ld_client.client_app"


def installed_sources() -> dict[str, bytes]:
    """The sources that a bundle of the installed software holds, by their names in it."""
    sources = package_sources()
    return {name: sources[name] for name in sorted(import_closure(bundle_roots(), sources))}


def package_sources() -> dict[str, bytes]:
    """All sources of `PACKAGES` as they are installed, by name, such as `ld_common/core/errors.py`."""
    files = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in [] if spec is None else spec.submodule_search_locations or []:
            for source in sorted(Path(folder).rglob("*.py")):
                files[f"{package}/{source.relative_to(folder).as_posix()}"] = source.read_bytes()
    return files


def bundle_roots() -> list[str]:
    """The ClientApp's module, and those of our adapters, which a study loads by name."""
    return [CLIENT_APP, *sorted(ADAPTERS.builtin_modules())]


def import_closure(roots: Collection[str], sources: Mapping[str, bytes]) -> set[str]:
    """Names of the files that importing `roots` can read, with their packages' `__init__.py`.

    Imports inside functions count, as they run later; those under `if TYPE_CHECKING` do not, as they never run. Modules
    that `sources` lacks are other people's.

    Args:
        roots: module names.
        sources: file name -> content, as `package_sources` gives them.
    """
    modules = {_module_name(name): name for name in sources}
    reached: set[str] = set()
    pending = list(roots)
    while pending:
        parts = pending.pop().split(".")
        for length in range(1, len(parts) + 1):
            module = ".".join(parts[:length])
            name = modules.get(module)
            if name is not None and name not in reached:
                reached.add(name)
                pending += imported_modules(module, name.endswith("/__init__.py"), sources[name])
    return reached


def bundle_unreached_lines(files: Mapping[str, bytes]) -> int:
    """Lines of a bundle's sources that its ClientApp cannot import; 0 for a bundle of this software."""
    sources = {name: content for name, content in files.items() if name.split("/")[0] in PACKAGES}
    reached = import_closure(bundle_roots(), sources)
    return sum(len(content.splitlines()) for name, content in sources.items() if name not in reached)


@functools.lru_cache(maxsize=1024)
def imported_modules(module: str, is_package: bool, source: bytes) -> tuple[str, ...]:
    """Absolute names of what a module's source imports; of `from a import b`, both `a` and `a.b`.

    A source that cannot be parsed cannot be run, and imports nothing.
    """
    return tuple(_imported_modules(module, is_package, source))


def _imported_modules(module: str, is_package: bool, source: bytes) -> Iterator[str]:
    package = module if is_package else module.rpartition(".")[0]
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in _executed_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _executed_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a tree but the bodies of `if TYPE_CHECKING`."""
    pending = [tree]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.expr):
            continue  # imports are statements
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            pending += node.orelse
        else:
            pending += ast.iter_child_nodes(node)
