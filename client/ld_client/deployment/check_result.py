"""Results of the checks of `ld-client check`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class CheckStatus(StrEnum):
    """Outcome of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check, with a remedy unless it is good."""

    name: str
    status: CheckStatus
    detail: str
    remedy: str = ""


def good(name: str, detail: str) -> CheckResult:
    """A check that found nothing wrong."""
    return CheckResult(name, CheckStatus.OK, detail)


def warning(name: str, detail: str, remedy: str) -> CheckResult:
    """A finding that does not stop a round."""
    return CheckResult(name, CheckStatus.WARNING, detail, remedy)


def failed(name: str, detail: str, remedy: str) -> CheckResult:
    """A finding with which a round would fail or be refused."""
    return CheckResult(name, CheckStatus.FAILED, detail, remedy)
