"""The page of formats: for a data manager who holds files and asks whether they are read, and if not, what to do."""

from __future__ import annotations

from typing import Any

PAGE = "formats.md"
SECTIONS = {
    "transfer syntaxes": (
        "DICOM: transfer syntaxes",
        "Transfer syntax",
        "How the pixels are compressed; element (0002,0010) of the file. *Lossy* is the compression, not the reading.",
    ),
    "DICOM": ("DICOM: kinds of images", "Image", "Modality, geometry and rescale come from the header."),
    "other formats": ("Other formats", "Format", "A row of the table names each file, since none says whose it is."),
    "tables": (
        "Tables",
        "Table",
        "The table of visits and all further ones. An encoding is never guessed: UTF-8, UTF-16 with a byte order mark, "
        "or the one that the site's file names.",
    ),
}
"""Group -> title, head of the first column, and what stands before the table."""


def formats_page(formats: dict[str, Any], layouts: dict[str, Any]) -> list[str]:
    """Lines of the page.

    Args:
        formats: what `formats.try_formats` returned.
        layouts: outcomes of `layouts.try_layout` by name.
    """
    decoders = ", ".join(f"{name} {number}" for name, number in formats["decoders"].items())
    lines = [
        "# Formats",
        "",
        "What `ld-client index` reads, and what it says of the rest. Each row was tried: a small file of the kind was "
        "given to the index, its pixels were compared with the true ones, and the sentence is the one that "
        "`ld-client exclusions` lists. Written by `make benchmark-scans`; what to do with such a file is in the "
        f"[guide](../howto/data-manager.md#index). Decoders that were installed: {decoders}.",
        "",
    ]
    for group, (title, head, text) in SECTIONS.items():
        entries = [entry for entry in formats["entries"] if entry["group"] == group]
        lines += [f"## {title}", "", text, ""]
        lines += _table([head, "Read"], [[_name(one), _how(one)] for one in entries if one["read"]])
        others = [[_name(one), escaped(one["said"])] for one in entries if not one["read"]]
        lines += _table([head, "Not read, because"], others)
    return lines + _layouts(layouts)


def escaped(text: str) -> str:
    """A sentence as Markdown shows it, on one line."""
    text = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())
    for mark in ("*", "_", "|", "`", "["):
        text = text.replace(mark, f"\\{mark}")
    return text


def _name(entry: dict[str, Any]) -> str:
    detail = f" `{entry['detail']}`" if entry["detail"] else ""
    return f"{escaped(entry['name'])}{detail}"


def _how(entry: dict[str, Any]) -> str:
    """How a format is read: exactly, with the loss of its compression, or with a setting."""
    if entry["said"]:
        return f"yes: {escaped(entry['said'])}"
    return "yes, lossy" if entry.get("difference") else "yes"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Two columns, so that a phone shows both; nothing without rows."""
    if not rows:
        return []
    return [f"| {' | '.join(head)} |", "|---|---|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def _layouts(layouts: dict[str, Any]) -> list[str]:
    lines = [
        "## Layouts of data sets",
        "",
        "`ld-client import` reads a data set as it comes, without a table made by hand "
        "([what each layout needs](../howto/data-manager.md#import-a-public-data-set)). A small tree of each layout "
        "was imported and indexed, and the store compared with what was planted: patient, day, attributes and picture.",
        "",
        "| Layout | Scans | Visits that arrived | Left out with a reason |",
        "|---|---|---|---|",
    ]
    for name, trial in layouts.items():
        arrived = f"{trial['visits']} of {trial['planted']}" + (" (**wrong**)" if trial["problems"] else "")
        lines.append(f"| {name} | {trial['form']} | {arrived} | {trial['left_out']} |")
    for name, trial in layouts.items():
        lines += ["", f"### {name}", "", "```sh", trial["command"], "```", ""]
        lines += [f"- {escaped(statement)}" for statement in trial.get("statements", ())]
        lines += [f"- **wrong**: {escaped(problem)}" for problem in trial["problems"]]
    return lines
