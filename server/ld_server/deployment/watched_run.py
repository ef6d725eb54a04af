"""A run that somebody looks at, and `ld-server status --follow`, which shows its rounds as they end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ld_common.core.errors import DeploymentError
from ld_common.protocol.study_config import StudyConfig
from ld_server.deployment.status import RUNNING, RunStatus, read_status
from ld_server.deployment.study_home import StudyHome
from ld_server.round_log import ROUNDS, RoundRecord, is_locked, read_rounds
from ld_server.tracking.run_study import RUN_STUDY, read_run_study

POLL_SECONDS = 1.0
START_SECONDS = 60.0
"""From `ld-server run` to the lock of the run's process, which loads the model libraries first."""


@dataclass(frozen=True)
class WatchedRun:
    """A run that somebody looks at: of a study's home, or of a folder, as a simulation leaves it."""

    folder: Path
    """The run's folder, the study's output."""
    home: StudyHome | None = None
    """None for a run without a home."""

    @classmethod
    def find(cls, place: Path) -> WatchedRun:
        """The run of a study's home, of a run's folder, or of an output folder of `ld-simulate`.

        Raises:
            DeploymentError: it is none of them.
        """
        place = place.resolve()
        home = StudyHome(place)
        if home.registry.exists():
            return cls(home.run, home)
        for folder in (place, place / "study"):
            if (folder / RUN_STUDY).exists():
                return cls(folder)
        raise DeploymentError(
            f"'{place}' is neither a study's home, made by ld-server provision, nor the folder of a run of this "
            f"version, which holds {RUN_STUDY}"
        )

    def study(self) -> StudyConfig:
        """The study that runs there; raises `LdError`."""
        return read_run_study(self.folder) if self.home is None else self.home.study()[0]

    def status(self) -> RunStatus:
        """Its status; raises `LdError`."""
        return read_status(self.folder, self.study(), None if self.home is None else self.home.sites())

    def rounds(self) -> list[RoundRecord]:
        """The rounds by the log alone, which is as new as the checkpoint and quicker to read; raises `LdError`."""
        return read_rounds(self.folder)

    def is_running(self) -> bool:
        """Whether a run holds the folder."""
        return is_locked(self.folder)

    def begins(self) -> bool:
        """Wait until a run holds the folder; returns False when none does within `START_SECONDS`."""
        deadline = time.monotonic() + START_SECONDS
        while not self.is_running():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def version(self) -> tuple[int, ...]:
        """Changes whenever the log of the rounds does."""
        try:
            written = (self.folder / ROUNDS).stat()
        except FileNotFoundError:
            return ()
        return written.st_ino, written.st_mtime_ns, written.st_size


def follow(run: WatchedRun, shown: int) -> Iterator[RoundRecord]:
    """Each round after the first `shown` as it ends, until the run ends; raises `LdError`."""
    seen: tuple[int, ...] | None = None
    running = True
    while running:
        running = run.is_running()  # asked before the log is read, so that the last round is not missed
        version = run.version()
        if version and version != seen:  # a run that begins removes the log first
            seen, records = version, run.rounds()
            yield from records[shown:]
            shown = len(records)
        if running:
            time.sleep(POLL_SECONDS)


def follow_status(run: WatchedRun, show: Callable[[RunStatus | RoundRecord, Sequence[str]], None]) -> None:
    """Show the status, each new round and the status at the end of the run; `show` gets each with its text.

    A run that is not under way is waited for, unless the release is written already.

    Raises:
        LdError: the folder cannot be read.
    """
    report = run.status()
    waits = report.state != RUNNING and not report.ended
    waiting = [f"waits up to {START_SECONDS:g} s for a run to begin"] if waits else []
    show(report, [*report.lines(), *waiting])
    if report.ended or (waits and not run.begins()):
        return
    for record in follow(run, report.rounds_done):
        show(record, [round_line(record)])
    end = run.status()
    show(end, end.lines()[:1])


def round_line(record: RoundRecord) -> str:
    """A round as one line."""
    left_out = "".join(f"; left out {name}: {reason}" for name, reason in record.left_out.items())
    failed = f"; not counted: {record.failure}" if record.failure else ""
    sites = ", ".join(_site_words(name, record) for name in record.sites) or "no site"
    return f"round {record.round} in {record.seconds:.0f} s: {sites}{_validation_words(record)}{left_out}{failed}"


def _site_words(name: str, record: RoundRecord) -> str:
    loss = record.sites[name].get("loss_last")
    return name if loss is None else f"{name} loss {loss:.4g}"


def _validation_words(record: RoundRecord) -> str:
    loss = record.validation_mean.get("loss")
    return "" if loss is None else f"; validation loss {loss:.4g}"
