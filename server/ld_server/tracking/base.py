"""What a tracker is: something that is given each round's record once."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ld_common.core.atomic_files import write_bytes
from ld_common.core.config import to_mapping
from ld_common.protocol.study_config import NOT_DIGESTED, StudyConfig
from ld_server.round_log import RoundRecord

SENT = "tracking.json"
"""File of a run's folder: for each tracker outside of it, the id of the run there and the last round that it has."""


class Tracker(ABC):
    """Keeps a run's numbers somewhere; any error that it raises turns it off, and never ends the run."""

    name: str
    """As in `study.trackers`."""

    def __init__(self, study: StudyConfig, output: Path) -> None:
        self.study, self.output = study, output

    @abstractmethod
    def begin(self, records: Sequence[RoundRecord]) -> None:
        """The run begins after these rounds, those of the runs that it continues."""

    @abstractmethod
    def add(self, record: RoundRecord) -> None:
        """A round has ended."""

    @abstractmethod
    def end(self, failed: bool) -> None:
        """The run has ended, without a release if it failed."""


class RemoteTracker(Tracker):
    """A tracker whose numbers cannot be written anew: a resumed run sends only the rounds that it lacks.

    Where it holds rounds that the resumed run does not, as after a damaged checkpoint, a new run is begun there.
    """

    @abstractmethod
    def open(self, run: str | None) -> str:
        """Continue a run, or begin a new one for None; returns its id."""

    @abstractmethod
    def send(self, record: RoundRecord) -> None:
        """Send a round."""

    def begin(self, records: Sequence[RoundRecord]) -> None:
        """Open the run and send the rounds that it lacks."""
        run, last = self._sent()
        if last > len(records):
            run, last = None, 0
        self._run = self.open(run)
        self._note(last)
        for record in records[last:]:
            self.add(record)

    def add(self, record: RoundRecord) -> None:
        """Send a round, and note that it was sent."""
        self.send(record)
        self._note(record.round)

    def _sent(self) -> tuple[str | None, int]:
        """The run that belongs to this study, or None, and the last round that it has."""
        noted = self._notes().get(self.name, {})
        if noted.get("study") != self.study.digest():
            return None, 0
        return noted["run"], noted["round"]

    def _note(self, last: int) -> None:
        entry = {"run": self._run, "round": last, "study": self.study.digest()}
        content = json.dumps(self._notes() | {self.name: entry}, indent=1) + "\n"
        write_bytes(self.output / SENT, content.encode())

    def _notes(self) -> dict[str, Any]:
        path = self.output / SENT
        notes: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return notes


def study_settings(study: StudyConfig) -> dict[str, Any]:
    """The study's settings by dotted key; paths of the server are left out."""
    content = {key: value for key, value in to_mapping(study).items() if key not in NOT_DIGESTED}
    return dict(_flat(content, "")) | {"study_digest": study.digest()}


def _flat(content: dict[str, Any], prefix: str) -> Sequence[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in content.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs
