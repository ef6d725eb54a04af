"""The project is a Flower app of format 1, which `flwr run .` bundles."""

from __future__ import annotations

import io
import tomllib
import zipfile
from pathlib import Path

from flwr.cli.build import build_fab_from_files

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_flower_bundles_the_project_as_format_one() -> None:
    names = ["pyproject.toml", "README.md", "LICENSE"]
    for package in ("ld_common", "server", "client", "simulations"):
        names += [path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")]
    content, metadata = build_fab_from_files({name: ROOT / name for name in names})
    assert (metadata.fab_format_version, metadata.flwr_version_min) == (1, "1.41")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert {"LICENSE", "ld_common/core/config.py", "simulations/ld_simulations/app.py"} <= set(archive.namelist())


def test_every_run_config_key_has_a_comment() -> None:
    lines = (ROOT / "pyproject.toml").read_text().split("[tool.flwr.app.config]\n")[1].split("\n\n")[0].splitlines()
    assert len(lines) == len(PROJECT["tool"]["flwr"]["app"]["config"])
    assert all(" # " in line for line in lines)
