"""What every command line shares: help at once, a refusal of a wrong command line at once."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_modules_that_load_no_model_import_no_model_library() -> None:
    modules = [
        "ld_client.data.exclusions",
        "ld_client.deployment.check",
        "ld_client.privacy.budget",
        "ld_common.release.trusted_keys",
        "ld_server.deployment.status",
    ]
    assert imported_by(modules, {"diffusers", "transformers", "peft", "monai"}) == set()
