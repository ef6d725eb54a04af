"""Writes what an import made: visits.csv and site.yaml for `ld-client index`, and what was left out."""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ld_client.layouts.base import LayoutImport
from ld_client.layouts.entries import LayoutVisit
from ld_common.core.atomic_files import write_bytes
from ld_common.core.config import require

VISITS, SITE, LEFT_OUT, CONTRADICTIONS = "visits.csv", "site.yaml", "left_out.csv", "contradictions.csv"
READABLE_BY_OWNER = 0o600
"""The files name patients."""


@dataclass(frozen=True)
class SiteEntries:
    """What site.yaml says beside the data."""

    site: str
    modality: Path
    base_model: str


def check_output(folder: Path, root: Path, force: bool) -> None:
    """Refuse, before anything is read, a folder inside the root or one that holds an earlier import."""
    inside = folder.resolve().is_relative_to(root.resolve())
    require(not inside, f"'{folder}' lies in the root '{root}', which stays as it is: use --out FOLDER outside of it")
    present = [name for name in (VISITS, SITE, LEFT_OUT, CONTRADICTIONS) if (folder / name).exists()]
    require(force or not present, f"'{folder}' has {', '.join(present)} already: use --force, or another --out")


def write_left_out(folder: Path, run: LayoutImport) -> list[Path]:
    """Write what was left out, and the contradictions if there are any."""
    lines = [(entry.name, entry.files, entry.rows, entry.cause.value, entry.detail) for entry in run.left_out]
    written = [_write_table(folder / LEFT_OUT, ("name", "files", "rows", "reason", "detail"), lines)]
    conflicts = [(entry.kind.value, entry.patient, entry.detail) for entry in run.contradictions]
    (folder / CONTRADICTIONS).unlink(missing_ok=True)
    if conflicts:
        written.append(_write_table(folder / CONTRADICTIONS, ("kind", "patient", "detail"), conflicts))
    return written


def write_site(folder: Path, run: LayoutImport, visits: Sequence[LayoutVisit], entries: SiteEntries) -> list[Path]:
    """Write the table of visits and the site's config that reads it."""
    dated = all(visit.date is not None for visit in visits)
    attributes = [name for name in run.modality.attributes if any(visit.attributes.get(name) for visit in visits)]
    first: dict[str, datetime.date] = {}
    for visit in visits:
        if visit.date is not None:
            first[visit.patient] = min(visit.date, first.get(visit.patient, visit.date))
    lines = [
        (
            visit.patient,
            _time(visit, dated, first),
            visit.file,
            *(visit.attributes.get(name, "") for name in attributes),
        )
        for visit in visits
    ]
    table = _write_table(folder / VISITS, ("patient", "date" if dated else "day", "file", *attributes), lines)
    columns: dict[str, Any] = {"patient": "patient", "date": "date" if dated else ""}
    columns |= {} if dated else {"day": "day"}
    columns |= {"file": "file", "attributes": {name: name for name in attributes}}
    data: dict[str, Any] = {"root": str(run.root.resolve()), "table": VISITS, "columns": columns}
    if any(not visit.file for visit in visits) and len(run.options.series) == 1:
        data["series"] = {"description": run.options.series[0]}
    site: dict[str, Any] = {"site": entries.site, "modality": str(entries.modality.resolve())}
    site |= {"base_model": _base_model(entries.base_model)} if entries.base_model else {}
    site |= {"store": "store", "data": data}
    text = "# Written by ld-client import: ld-client index --config site.yaml reads it. docs/howto/data-manager.md\n"
    if not entries.base_model:
        text += "# base_model: FOLDER      fill in the base model of the study\n"
    text += yaml.safe_dump(site, sort_keys=False, allow_unicode=True, width=10_000)
    write_bytes(folder / SITE, text.encode(), READABLE_BY_OWNER)
    return [table, folder / SITE]


def _time(visit: LayoutVisit, dated: bool, first: dict[str, datetime.date]) -> str:
    if visit.date is None:
        return str(visit.day or 0)
    return visit.date.isoformat() if dated else str((visit.date - first[visit.patient]).days)


def _base_model(text: str) -> str:
    """A folder's full path, or a model's id as it is."""
    return str(Path(text).resolve()) if Path(text).exists() else text


def _write_table(path: Path, header: Sequence[str], lines: Iterable[Sequence[object]]) -> Path:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    write_bytes(path, stream.getvalue().encode("utf-8", "replace"), READABLE_BY_OWNER)
    return path
