"""TensorBoard's event files in the run's folder, by torch's own writer: `tensorboard --logdir RUN/tensorboard`."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ld_common.protocol.study_config import StudyConfig
from ld_server.round_log import RoundRecord
from ld_server.tracking.base import Tracker, study_settings
from ld_server.tracking.numbers import round_numbers

FOLDER = "tensorboard"


class TensorboardFiles(Tracker):
    """Writes the rounds of earlier runs anew when a run begins, so that the files hold each round once."""

    name = "tensorboard"

    def __init__(self, study: StudyConfig, output: Path) -> None:
        super().__init__(study, output)
        self._writer: Any = None

    def begin(self, records: Sequence[RoundRecord]) -> None:
        """Replace the event files."""
        from torch.utils.tensorboard import SummaryWriter

        folder = self.output / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for former in folder.glob("events.out.tfevents.*"):
            former.unlink()
        # purge_step tells a TensorBoard that runs already to forget what it has read
        self._writer = SummaryWriter(str(folder), purge_step=0)
        settings = json.dumps(study_settings(self.study), indent=1, sort_keys=True, ensure_ascii=False)
        self._writer.add_text("study", "".join(f"    {line}\n" for line in settings.splitlines()))
        for record in records:
            self._write(record)
        self._writer.flush()

    def add(self, record: RoundRecord) -> None:
        """Write a round to disk."""
        self._write(record)
        self._writer.flush()

    def end(self, failed: bool) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, record: RoundRecord) -> None:
        ended = datetime.datetime.fromisoformat(record.ended).timestamp()
        for name, value in round_numbers(record).items():
            self._writer.add_scalar(name, value, record.round, walltime=ended)
