"""`record.json`: what is needed to draw a folder's files again, and what speaks against them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ld_common.editing.base import Editor
from ld_common.editing.registry import editor_options
from ld_common.imaging.modality import Attributes
from ld_common.imaging.scan_table import shown
from ld_common.release.abilities import abilities
from ld_common.release.release import Release, release_editor, release_record, software
from ld_generate.samples import extrapolated, write_record_file

MAX_SCALE_RATIO = 3.0
"""Guidance scales above this multiple of the release's own (or of 1, if that is larger) cause a warning."""


def write_record(
    folder: Path,
    release: Release,
    editor: Editor,
    content: dict[str, Any],
    warnings: Sequence[str] = (),
) -> Path:
    """Write `record.json`: all that is needed to draw the folder's files again, what the release's evaluation says of
    such edits, and warnings.

    Args:
        folder: of the scan's results.
        release: the release.
        editor: how edits were drawn.
        content: entries of the record, `source` and `counterfactuals` among them.
        warnings: further ones.
    """
    attributes = [content["source"], *(entry["target"] for entry in content["counterfactuals"])]
    record = {
        "release": release_record(release),
        "edit": editor_options(editor),
        "software": software(),
        "evaluation": abilities(release.manifest.get("evaluation", {}), _changed(content)),
        "warnings": [*extrapolated(release, attributes), *_excessive_guidance(release, editor), *warnings],
        **preparation(release),
        **content,
    }
    return write_record_file(folder, record)


def preparation(release: Release) -> dict[str, Any]:
    """The record's entry on how scans were prepared, with the hash of each file; empty where they were not."""
    steps = release.modality.preprocessing
    return {"preparation": [step.shared() for step in steps]} if steps else {}


def _changed(content: dict[str, Any]) -> set[str]:
    """Attributes that any counterfactual of a record changes."""
    return {name for entry in content["counterfactuals"] for name in entry["target"]}


def file_stem(target: Attributes, delta: float) -> str:
    """Name of a counterfactual's files without their endings."""
    name = "_".join(f"{key}-{shown(value)}" for key, value in target.items())
    return name + (f"_drift{delta:+g}" if delta else "")


def _excessive_guidance(release: Release, editor: Editor) -> list[str]:
    scale, recommended = editor.guidance_scale, release_editor(release).guidance_scale
    if scale <= MAX_SCALE_RATIO * max(recommended, 1.0):
        return []
    return [f"guidance_scale {scale:g}: the release recommends {recommended:g}; this high, artefacts are likely"]
