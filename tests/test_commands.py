"""What every command line shares: help at once, a refusal of a wrong command line at once."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
COMMANDS = {name: entry.split(":")[0] for name, entry in PROJECT["scripts"].items()}
HEAVY = ("torch", "diffusers", "transformers", "monai", "scipy", "matplotlib")
"""What takes seconds to import."""


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_needs_no_model_library(command: str) -> None:
    code = f"import sys, {COMMANDS[command]}; print(*{set(HEAVY)} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    "module",
    [
        "ld_client.data.store",
        "ld_client.deployment.check",
        "ld_client.privacy.budget",
        "ld_common.release.trusted_keys",
        "ld_server.deployment.status",
    ],
)
def test_what_loads_no_model_imports_no_model_library(module: str) -> None:
    code = f"import sys, {module}; print(*{{'diffusers', 'transformers', 'peft', 'monai'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
