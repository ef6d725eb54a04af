"""The trackers of a run together: refused before it begins where a package is absent, turned off where one fails."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ld_common.core.config import require
from ld_common.protocol.study_config import StudyConfig
from ld_server.round_log import RoundRecord
from ld_server.tracking.base import Tracker
from ld_server.tracking.mlflow_run import MlflowRun
from ld_server.tracking.rounds_csv import RoundsCsv
from ld_server.tracking.tensorboard_files import TensorboardFiles
from ld_server.tracking.wandb_run import WandbRun

ALWAYS: tuple[type[Tracker], ...] = (RoundsCsv, TensorboardFiles)
BY_OPTION: dict[str, type[Tracker]] = {"mlflow": MlflowRun, "wandb": WandbRun}
REQUIREMENTS = {"mlflow": "mlflow-skinny>=3,<4", "wandb": "wandb>=0.20,<1"}
"""What pip installs for a tracker, as the extra of the same name."""
MAX_REASON = 200


class Tracking:
    """Gives each record to every tracker; one that fails is named once and gets no more of this run."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)
        self._begun = False

    def begin(self, records: Sequence[RoundRecord]) -> None:
        """The run begins after these rounds."""
        self._begun = True
        self._each("at the start", lambda tracker: tracker.begin(records))

    def add(self, record: RoundRecord) -> None:
        """A round has ended."""
        self._each(f"in round {record.round}", lambda tracker: tracker.add(record))

    def end(self, failed: bool) -> None:
        """The run has ended."""
        if self._begun:
            self._each("at the end", lambda tracker: tracker.end(failed))

    def _each(self, when: str, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:  # whatever a library of others raises
                self._trackers.remove(tracker)
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_REASON]
                print(
                    f"tracker {tracker.name} failed {when} and is off, the run goes on ({reason}); a resumed run "
                    "writes what it lacks",
                    flush=True,
                )


@contextmanager
def tracked(study: StudyConfig, output: Path) -> Iterator[Tracking]:
    """The trackers of a run, ended with it.

    Raises:
        ConfigError: a package is absent, before anything is loaded.
    """
    check_trackers(study)
    kinds = [*ALWAYS, *(BY_OPTION[name] for name in dict.fromkeys(study.trackers))]
    tracking = Tracking([kind(study, output) for kind in kinds])
    failed = True
    try:
        yield tracking
        failed = False
    finally:
        tracking.end(failed)


def check_trackers(study: StudyConfig) -> None:
    """Raise `ConfigError` for a tracker whose package is not installed."""
    for name in study.trackers:
        installed = importlib.util.find_spec(name) is not None
        require(
            installed,
            f"trackers: '{name}' needs its package, which is not installed: pip install '{REQUIREMENTS[name]}', or "
            f"take '{name}' out of the study's trackers",
        )
