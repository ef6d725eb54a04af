"""JSON that others wrote and that is signed, hashed or approved: each key stands once."""

from __future__ import annotations

import json
from typing import Any


def read_json(text: str | bytes) -> Any:
    """Parse JSON; readers disagree on which of two equal keys counts, so one could check what another does not use.

    Raises:
        ValueError: no JSON, or an object with a key that stands twice.
        RecursionError: nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object of the JSON has a key that stands twice")
    return content
