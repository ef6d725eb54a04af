"""ld_generate stands on ld_common alone, and its wheel holds what it needs and no more."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.support.releases import SOURCE

ROOT = Path(__file__).parent.parent.parent
ABSENT = ("flwr", "nilearn", "opacus", "ld_server", "ld_client", "ld_simulations", "gradio")
PACKAGES = {"ld_common", "ld_generate", "ld_evaluate"}


def run_alone(code: str, folder: Path) -> None:
    """Run Python code in a process in which the packages of `ABSENT` are not installed; it must succeed."""
    block = f"""
import importlib.metadata, sys
for name in {ABSENT}:
    sys.modules[name] = None  # importing it now fails
version = importlib.metadata.version
def installed_version(name):
    if name in {ABSENT}:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = installed_version
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", block + code], check=False, capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_its_modules_need_no_federation_library(tmp_path: Path) -> None:
    files = (path for path in (ROOT / "server/ld_generate").rglob("*.py") if path.parent.name != "web")
    modules = (path.relative_to(ROOT / "server").with_suffix("").as_posix().replace("/", ".") for path in files)
    run_alone(f"import {', '.join(sorted(name.removesuffix('.__init__') for name in modules))}", tmp_path)


@pytest.mark.slow
def test_an_edit_needs_no_federation_library(release: Path, scan: Path, tmp_path: Path) -> None:
    arguments = ["edit", str(release), "--allow-unsigned", "--input", str(scan), "--target", "age=80"]
    arguments += ["--source", SOURCE, "--out", str(tmp_path / "out")]
    run_alone(
        f"import ld_generate.cli, ld_common.core.command as command\ncommand.run_cli(ld_generate.cli.cli, {arguments})",
        tmp_path,
    )
    assert (tmp_path / "out" / "scan" / "age-80.dcm").exists()


@pytest.mark.slow
def test_the_wheel_holds_three_packages(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("server/ld_generate", "server/ld_evaluate", "server/ld_server", "ld_common"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    shutil.copy(ROOT / "server/pyproject.toml", source / "server")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source / "server")], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("latent_drift_generate-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        (entry_points,) = (name for name in files if name.endswith("entry_points.txt"))
        scripts = archive.read(entry_points).decode()
    assert {name.split("/")[0] for name in files if ".dist-info" not in name} == PACKAGES
    assert "ld_common/py.typed" in files
    assert {"ld_generate/cli.py", "ld_generate/commands/edit.py", "ld_generate/web/server.py"} <= set(files)
    assert "ld-generate = ld_generate.cli:main" in scripts
    assert "ld-evaluate = ld_evaluate.cli:main" in scripts


def test_the_wheel_asks_for_what_its_packages_import_in_the_whole_softwares_ranges() -> None:
    wheel, whole = (
        tomllib.loads((ROOT / file).read_text())["project"] for file in ("server/pyproject.toml", "pyproject.toml")
    )
    assert set(wheel["dependencies"]) <= set(whole["dependencies"])
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in wheel["dependencies"]}
    assert not names & set(ABSENT)
    imported = {module for module in imports_of("server/ld_generate", "server/ld_evaluate")}
    distributions = packages_distributions()
    needed = {distributions[module][0].lower() for module in imported if module in distributions}
    assert needed - {"gradio", "starlette", "latent-drift-federation"} <= names  # the page is an extra


def imports_of(*packages: str) -> set[str]:
    """The top-level modules that the sources of some packages import, ours excluded."""
    modules: set[str] = set()
    for file in (path for package in packages for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.split(".")[0])
    return {module for module in modules if not module.startswith("ld_") and module not in sys.stdlib_module_names}
