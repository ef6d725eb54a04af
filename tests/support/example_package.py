"""The package `ld-example` that docs/extending.md writes in full, built from the page."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/extending.md"
BLOCK = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```', re.MULTILINE | re.DOTALL)


def write_example_package(folder: Path) -> Path:
    """Write the package into `folder` as an installer would, with its metadata; returns `folder`, for `sys.path`."""
    files = dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))
    project = tomllib.loads(files.pop("pyproject.toml"))["project"]
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    info = f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    entry_points = "\n".join(
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
        for group, points in project["entry-points"].items()
    )
    files |= {f"{info}/METADATA": metadata, f"{info}/entry_points.txt": entry_points, f"{info}/INSTALLER": "tests\n"}
    (folder / info).mkdir()
    for name in ("METADATA", "entry_points.txt", "INSTALLER"):
        (folder / info / name).write_text(files[f"{info}/{name}"], encoding="utf-8")
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    (folder / info / "RECORD").write_text(record, encoding="utf-8")
    return folder
