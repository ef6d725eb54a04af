"""What every command line shares: help at once, a refusal of a wrong command line at once."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ld_common.editing.registry import EDITORS
from ld_generate.cli import cli as generate

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
COMMANDS = {name: entry.split(":")[0] for name, entry in PROJECT["scripts"].items()}
HEAVY = {"torch", "diffusers", "transformers", "monai", "opacus", "flwr", "gradio", "scipy", "matplotlib"}
"""What takes seconds to import."""


def imported_by(modules: list[str], names: set[str]) -> set[str]:
    """Those of `names` that a fresh interpreter has loaded after it imported `modules`."""
    code = f"import sys, {', '.join(modules)}; print(*{names} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_importing_a_command_imports_no_model_library() -> None:
    assert imported_by(sorted(set(COMMANDS.values())), HEAVY) == set()


def test_modules_that_load_no_model_import_no_model_library() -> None:
    modules = [
        "ld_client.data.store",
        "ld_client.deployment.check",
        "ld_client.privacy.budget",
        "ld_common.release.trusted_keys",
        "ld_server.deployment.status",
        "ld_generate.runner",
    ]
    assert imported_by(modules, {"diffusers", "transformers", "peft", "monai"}) == set()


def test_help_names_every_way_of_editing() -> None:
    said = CliRunner().invoke(generate, ["--help"], env={"COLUMNS": "300"}).output
    words = set(said.replace(",", " ").replace(".", " ").split())
    assert set(EDITORS) <= words


@pytest.mark.parametrize(
    "arguments",
    [
        ["--slices", "1:2"],
        ["--volume", "--batch", "rows.csv"],
        ["--volume", "--input", "a.nii", "--drift", "auto"],
        ["--batch", "rows.csv", "--set", "age=80"],
        ["--seeds", "2"],
        ["--input", "a.png", "--trajectory", "age=1:2:1", "--drift", "0", "--drift", "0.1"],
    ],
)
def test_options_that_exclude_each_other_are_refused_before_anything_is_read(arguments: list[str]) -> None:
    code = f"""
import sys
sys.modules["torch"] = None  # importing it now fails
from ld_common.core.command import run_cli
from ld_generate.cli import cli
run_cli(cli, {["--release", "nowhere", *arguments]})
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --"), done.stderr
