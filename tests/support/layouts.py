"""The importer of layouts, run as a data manager runs it; `ld_simulations.benchmarks.scans.layout_trees` has trees."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from ld_client.cli import app

CONFIGS = Path(__file__).parents[2] / "configs/modalities"
BRAIN, CHEST = CONFIGS / "brain_mri.yaml", CONFIGS / "chest_radiograph.yaml"
CASES = Path(__file__).parents[3] / "shared/cases"


class Imported:
    """What one import wrote and said."""

    def __init__(self, out: Path, text: str) -> None:
        self.out = out
        self.summary: dict[str, Any] = json.loads(text[text.index("{") :])
        self.visits = self._table("visits.csv")
        self.left_out = self._table("left_out.csv")

    def _table(self, name: str) -> list[dict[str, str]]:
        with (self.out / name).open(newline="") as stream:
            return list(csv.DictReader(stream))

    def why(self, name: str) -> str:
        """The reason why a file or row was left out."""
        (reason,) = (entry["reason"] for entry in self.left_out if entry["name"] == name)
        return reason

    def reasons(self) -> dict[str, tuple[int, int]]:
        """Reason -> files and rows in the summary."""
        return {entry["cause"]: (entry["files"], entry["rows"]) for entry in self.summary["left_out"]}


def import_tree(layout: str, root: Path, out: Path, *options: str, modality: Path = BRAIN) -> Imported:
    """Run `ld-client import`; raises what it raises."""
    arguments = ["import", layout, str(root), "--out", str(out), "--modality", str(modality), "--json", *options]
    result = CliRunner().invoke(app, arguments, catch_exceptions=True)
    if result.exception is not None:
        raise result.exception
    return Imported(out, result.stdout)
