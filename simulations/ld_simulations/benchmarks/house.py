"""`ld-benchmark house`: size and shape of the code base and its documentation, as flat numbers."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ld_common.core.atomic_files import write_bytes
from ld_common.core.config import load_config, require
from ld_simulations.benchmarks.harness import json_bytes

NUMBERS = "house.json"
PACKAGE_FOLDERS = ("ld_common", "server", "client", "simulations")
MOST_PARAMETERS = 8
REFERENCE = ("docs/reference/*.md", "docs/api.md")
SECONDS = {"make_test_seconds": "runs/make_test_seconds", "ci_seconds": "runs/ci_seconds"}
"""Files in which `make test` and `.ci/run` leave the seconds that they took."""


@dataclass
class HouseConfig:
    """What is counted, and where the numbers go."""

    results: str = "docs/benchmarks"
    project: str = "."
    """The repository's folder."""

    def __post_init__(self) -> None:
        project = Path(self.project)
        found = (project / "ld_common").is_dir() and (project / "README.md").is_file()
        require(found, f"project: '{self.project}' is not this repository: run in it, or name it with project=FOLDER")


def load_house_config(path: Path, overrides: list[str]) -> HouseConfig:
    """Read the config; raises `ConfigError`."""
    return load_config(HouseConfig, path, overrides)


def run(config: HouseConfig, only_report: bool, console: Console) -> list[Path]:
    """Count, and write the numbers; returns the file. Nothing takes long enough to be left out of a report."""
    file = Path(config.results) / NUMBERS
    write_bytes(file, json_bytes(house_numbers(Path(config.project))))
    return [file]


def house_numbers(project: Path) -> dict[str, int | float | None]:
    """All numbers; None where a file that holds one is absent."""
    names = public_names()
    return {
        "readme_words": words_without_code((project / "README.md").read_text(encoding="utf-8")),
        "ld_common_top_level_modules": len(top_level_modules(project / "ld_common")),
        "bundle_unreached_lines": unreached_lines(),
        "make_test_seconds": _number_in(project / SECONDS["make_test_seconds"]),
        "ci_seconds": _number_in(project / SECONDS["ci_seconds"]),
        "functions_over_8_parameters": len(long_signatures(project)),
        "duplicate_class_names": len(duplicate_class_names(project)),
        "public_names": len(names),
        "public_names_in_reference": sum(name in _reference_words(project) for name in names),
    }


def words_without_code(markdown: str) -> int:
    """Words of a Markdown text outside of fenced code blocks."""
    return len(re.sub(r"^```.*?^```$", "", markdown, flags=re.MULTILINE | re.DOTALL).split())


def top_level_modules(package: Path) -> list[str]:
    """Modules and subpackages right below a package."""
    files = [path.stem for path in package.glob("*.py") if path.stem != "__init__"]
    return sorted([*files, *(path.parent.name for path in package.glob("*/__init__.py"))])


def sources(project: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Every Python file of the packages, parsed."""
    for folder in PACKAGE_FOLDERS:
        for path in sorted((project / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def long_signatures(project: Path) -> list[str]:
    """Functions with more than 8 parameters, `self` and `cls` not counted."""
    names = []
    for path, tree in sources(project):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = sum(argument.arg not in ("self", "cls") for argument in arguments)
                count += (node.args.vararg is not None) + (node.args.kwarg is not None)
                if count > MOST_PARAMETERS:
                    names.append(f"{path.relative_to(project)}:{node.lineno} {node.name}")
    return names


def duplicate_class_names(project: Path) -> list[str]:
    """Names that several classes of the packages have."""
    counts = Counter(
        node.name for _, tree in sources(project) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    )
    return sorted(name for name, count in counts.items() if count > 1)


def public_names() -> list[str]:
    """`ld_common.__all__`, the public Python API."""
    return list(getattr(importlib.import_module("ld_common"), "__all__", []))


def unreached_lines() -> int | None:
    """Lines of the site's code bundle that the ClientApp never imports; None where no function computes them."""
    module: Any = importlib.import_module("ld_common.protocol.code_bundle")
    if not hasattr(module, "bundle_unreached_lines"):
        return None
    return int(module.bundle_unreached_lines(module.installed_sources()))


def _reference_words(project: Path) -> set[str]:
    """Identifiers in the pages of the API reference."""
    files = [file for pattern in REFERENCE for file in project.glob(pattern)]
    return {word for file in files for word in re.findall(r"\w+", file.read_text(encoding="utf-8"))}


def _number_in(file: Path) -> float | None:
    try:
        return float(file.read_text())
    except (OSError, ValueError):
        return None
