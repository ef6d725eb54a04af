"""The README's file tree and numbers are those of the repository."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ld_simulations.summary import AIMS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PACKAGES = ("ld_common", "server/ld_server", "client/ld_client", "simulations/ld_simulations")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_tree_names_every_module_and_no_other(package: str) -> None:
    section = README.split(f"\n{package}/ ", 1)[1]
    named = {match[1] for match in re.finditer(r"^  (\w+\.py) ", section.split("\n```")[0].split("/ ")[0], re.M)}
    modules = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
    assert named == modules


def test_the_numbers_are_those_of_the_recorded_run() -> None:
    recorded = json.loads((ROOT / "docs" / "benchmarks" / "demo.json").read_text())
    for key in AIMS:
        row = next(line for line in README.splitlines() if line.startswith(f"| `{key}` |"))
        shown = float(row.split("|")[2].replace(",", ""))
        assert shown == pytest.approx(recorded[key], rel=0.01)
