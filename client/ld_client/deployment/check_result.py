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
class CheckResult:
    """One line of the table."""

    name: str
    standing: Standing
    said: str
    remedy: str = ""


def good(name: str, said: str) -> CheckResult:
    """It is as it should be."""
    return CheckResult(name, Standing.OK, said)


def warning(name: str, said: str, remedy: str) -> CheckResult:
    """It does not stop a round; somebody should look."""
    return CheckResult(name, Standing.WARNING, said, remedy)


def failed(name: str, said: str, remedy: str) -> CheckResult:
    """A round would fail or be refused."""
    return CheckResult(name, Standing.FAILED, said, remedy)
