"""JSON that others wrote and that is signed, hashed or approved: each key stands once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 8 * 2**20
"""Of a manifest; parsed, JSON of small objects takes a hundred times as much."""


def read_limited(path: Path) -> bytes:
    """A file of at most `MAX_BYTES`; raises `OSError`, or `ValueError` for a larger one."""
    with path.open("rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    return content


def read_json(text: str | bytes) -> Any:
    """Parse JSON; readers disagree on which of two equal keys counts, so one could check what another does not use.

    Raises:
        ValueError: no JSON, an object with a key that stands twice, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object of the JSON has a key that stands twice")
    return content
