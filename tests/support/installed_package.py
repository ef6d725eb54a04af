"""Installs the example package of `tests/support/foreign_package` into a folder, as pip does with its wheel."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

SOURCE = Path(__file__).parent / "foreign_package"
PROJECT = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]
NAME = str(PROJECT["name"])


def install_example(folder: Path, version: str = PROJECT["version"], name: str = NAME) -> Path:
    """Put the package and its `.dist-info` into `folder`, to be placed on `sys.path`; returns the `.dist-info`."""
    package = folder / "ld_example"
    shutil.copytree(SOURCE / "ld_example", package, ignore=shutil.ignore_patterns("__pycache__"))
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (info / "INSTALLER").write_text("pip\n")
    lines = []
    for group, points in PROJECT["entry-points"].items():
        lines += [f"[{group}]", *(f"{point} = {target}" for point, target in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    write_record(folder, info)
    return info


def write_record(folder: Path, info: Path) -> None:
    """Write the list of installed files that pip keeps."""
    files = [*(folder / "ld_example").rglob("*.py"), *info.iterdir(), info / "RECORD"]
    (info / "RECORD").write_text("".join(f"{file.relative_to(folder).as_posix()},,\n" for file in sorted(set(files))))
