"""What a command prints at its end: folders and warnings, or JSON with the files and the biomarkers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ld_generate.console import print_note
from ld_generate.samples import RECORD

SUMMARY = ("source", "counterfactuals", "biomarkers_mm2", "seeds")
"""Entries of a record that are printed with `--json`."""


def print_results(files: Sequence[Path], as_json: bool) -> None:
    """Print each folder of results; warnings go to standard error, with `--json` into the JSON."""
    if as_json:
        print_json({"results": [summarize(folder, files) for folder in _folders(files)]})
        return
    print_warnings(files)
    console = Console()
    for folder in _folders(files):
        count = sum(folder in file.parents for file in files)
        console.print(f"wrote {folder}: {count} files", soft_wrap=True, highlight=False, markup=False)


def print_warnings(files: Sequence[Path]) -> None:
    """Print each warning of the records among `files` once, and what the evaluation says, to standard error."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.name == RECORD]
    for title, key in (("evaluation", "evaluation"), ("warning", "warnings")):
        for line in dict.fromkeys(line for record in records for line in record.get(key, [])):
            print_note(f"{title}: {line}")


def print_json(content: Any) -> None:
    """Print JSON to standard output."""
    print(json.dumps(content, indent=2, sort_keys=True))


def summarize(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """A folder of results: its files, biomarkers and warnings."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return {
        "folder": str(folder),
        "files": sorted(file.relative_to(folder).as_posix() for file in files if folder in file.parents),
        "warnings": record["warnings"],
        "evaluation": record.get("evaluation", []),
        **{name: record[name] for name in SUMMARY if name in record},
    }


def _folders(files: Sequence[Path]) -> list[Path]:
    return sorted(file.parent for file in files if file.name == RECORD)
