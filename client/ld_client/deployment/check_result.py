"""What `ld-client check` says of one thing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Standing(StrEnum):
    """How one thing stands."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    name: str
    standing: Standing
    said: str
    remedy: str = ""


def good(name: str, said: str) -> Finding:
    """It is as it should be."""
    return Finding(name, Standing.OK, said)


def warning(name: str, said: str, remedy: str) -> Finding:
    """It does not stop a round; somebody should look."""
    return Finding(name, Standing.WARNING, said, remedy)


def failed(name: str, said: str, remedy: str) -> Finding:
    """A round would fail or be refused."""
    return Finding(name, Standing.FAILED, said, remedy)
