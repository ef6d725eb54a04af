"""What a site's audit log says of its rounds and of what left, for a person to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ld_client.deployment.audit_log import LogEntry

TRAIN, EVALUATE = "train", "evaluate"
NUMBERS = {
    "visits": "number of visits",
    "patients": "number of patients",
    "loss_first": "first loss",
    "loss_last": "last loss",
    "seconds": "seconds of training",
    "coverage": "ranges of ages and categories",
}
"""What leaves beside the tensors, in words."""


@dataclass
class SiteRound:
    """What the audit log says of this site's part in one round of one run."""

    number: int
    time: str = ""
    """Of its last entry."""
    patients: int | None = None
    visits: int | None = None
    outcome: str = "task received"
    refused: bool = False
    sent_bytes: int = 0
    losses: tuple[float, float] | None = None
    """First and last, where they left."""
    validation: float | None = None


def site_rounds(log: Sequence[LogEntry]) -> list[SiteRound]:
    """This site's rounds, by the order in which they were first asked for; a round of another run is another one."""
    rounds: dict[tuple[str, int], SiteRound] = {}
    for entry in log:
        details = entry.details
        number = details.get("round")
        if number is None or entry.event not in ("task", "training", "left", "refused"):
            continue
        found = rounds.setdefault((str(details.get("run")), int(number)), SiteRound(int(number)))
        found.time = entry.time
        if entry.event == "training":
            found.patients, found.visits = details["patients"], details["visits"]
            found.outcome, found.refused = "training", False
        elif entry.event == "refused":
            of_validation = details.get("kind") == EVALUATE
            found.outcome = f"{'validation refused' if of_validation else 'refused'}: {details['code']}"
            found.refused = not of_validation
        elif entry.event == "left" and details.get("kind") == TRAIN:
            found.outcome, found.refused = "update sent", False
            found.sent_bytes += sent_bytes(entry)
            numbers = details.get("numbers")
            found.losses = None if numbers is None else (numbers["loss_first"], numbers["loss_last"])
        elif entry.event == "left" and details.get("scores") is not None:
            found.validation = details["scores"].get("loss")
    return list(rounds.values())


def sent_bytes(entry: LogEntry) -> int:
    """Size of what a `left` entry records: its tensors, 8 a score, keys and shares of secure aggregation."""
    if entry.details.get("scores") is not None:
        return 8 * len(entry.details["scores"])
    if "bytes" in entry.details:
        return int(entry.details["bytes"])
    return _payload_bytes(entry.details.get("payload"))


def _payload_bytes(value: Any) -> int:
    if isinstance(value, dict):
        if set(value) == {"bytes", "sha256"}:
            return int(value["bytes"])
        return sum(map(_payload_bytes, value.values()))
    return sum(map(_payload_bytes, value)) if isinstance(value, list) else 0


def sent_words(entry: LogEntry) -> str:
    """What a `left` entry records, in words."""
    details = entry.details
    if "name" in details:
        return "the site's name"
    if details.get("scores") is not None:
        return f"scores on held-out patients: {', '.join(sorted(details['scores']))}"
    if details.get("kind") != TRAIN:
        return f"secure aggregation, stage {details.get('kind', '')}"
    parts = ["one masked vector"] if details.get("payload") is not None else []
    count = len(details.get("tensors", []))
    parts += [f"adapter of {count} {'tensor' if count == 1 else 'tensors'}"] if count else []
    parts += ["drift"] if details.get("drift") is not None else []
    parts += [f"{len(details['own'])} tensors of this site's own, for the release"] if details.get("own") else []
    numbers = details.get("numbers")
    parts.append("no counts or losses" if numbers is None else ", ".join(NUMBERS.get(name, name) for name in numbers))
    return "; ".join(parts)
