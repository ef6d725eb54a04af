"""Numbers beside their aims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ld_evaluate.report import format_number


@dataclass(frozen=True)
class Aim:
    """Bounds of a number, either of which may be open."""

    text: str
    at_least: float = -float("inf")
    at_most: float = float("inf")


def aim_met(key: str, summary: Mapping[str, Any], aims: Mapping[str, Aim]) -> bool:
    """Whether a summary's number lies within its aim."""
    return bool(aims[key].at_least <= summary[key] <= aims[key].at_most)


def aims_table(summary: Mapping[str, Any], aims: Mapping[str, Aim]) -> str:
    """Each number beside its aim, in Markdown."""
    lines = ["| number | measured | aim | |", "|---|---|---|---|"]
    for key, aim in aims.items():
        met = "met" if aim_met(key, summary, aims) else "**missed**"
        lines.append(f"| `{key}` | {format_number(summary[key])} | {aim.text} | {met} |")
    return "\n".join(lines) + "\n"
