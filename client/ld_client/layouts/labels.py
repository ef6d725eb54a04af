"""Findings of a chest data set (1 present, 0 absent, -1 uncertain, blank not mentioned) as values of `diagnosis`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ld_client.layouts.tables import LayoutRow
from ld_common.core.errors import ConfigError

FORM = 'write FINDING=VALUE, such as --label "Cardiomegaly=HF", or FINDING:0=VALUE for its absence'
_STATES = {"1": "present", "1.0": "present", "0": "absent", "0.0": "absent", "-1": "uncertain", "-1.0": "uncertain"}


@dataclass(frozen=True)
class FindingLabel:
    """A finding that, present or absent, gives a diagnosis."""

    finding: str
    state: str
    """`present` or `absent`."""
    value: str


def parse_label(text: str) -> FindingLabel:
    """Parse `Cardiomegaly=HF` or `Cardiomegaly:0=CN`; raises `ConfigError`."""
    left, equals, value = (part.strip() for part in text.rpartition("="))
    finding, colon, state = (part.strip() for part in left.partition(":"))
    if not (equals and finding and value) or (colon and state not in ("0", "1")):
        raise ConfigError(f"--label is '{text}': {FORM}")
    return FindingLabel(finding, "absent" if state == "0" else "present", value)


def diagnosis_of(row: LayoutRow, labels: Sequence[FindingLabel]) -> tuple[str, str]:
    """The diagnosis that the labels give a row.

    Returns:
        its value and ""; or "" and the finding that is uncertain, or the two values that the findings give; or "" and
        "" where no label applies.
    """
    states = {label.finding: _STATES.get(row.get(label.finding), "") for label in labels}
    uncertain = [finding for finding, state in states.items() if state == "uncertain"]
    if uncertain:
        return "", f"{uncertain[0]} is uncertain (-1)"
    values = sorted({label.value for label in labels if states[label.finding] == label.state})
    if len(values) > 1:
        return "", f"the findings give {' and '.join(values)}"
    return (values[0] if values else ""), ""
