"""A run of Weights & Biases: offline in the run's folder unless WANDB_MODE says otherwise, for `wandb sync` later."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from ld_common.protocol.study_config import StudyConfig
from ld_server.round_log import RoundRecord
from ld_server.tracking.base import RemoteTracker, study_settings
from ld_server.tracking.numbers import round_numbers

PROJECT = "latent-drift-federation"
START_SECONDS = 30.0
ERROR_REPORTING, FOLDERS = "WANDB_ERROR_REPORTING", ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")
"""Environment of W&B: crash reports to its makers, and where it writes besides the run."""


class WandbRun(RemoteTracker):
    """One run of the project that WANDB_PROJECT names. It sends the study's settings and the rounds' numbers.

    It sends no metadata of the machine, no measurements of it, no code, no console output and no crash report.
    """

    name = "wandb"

    def __init__(self, study: StudyConfig, output: Path) -> None:
        super().__init__(study, output)
        os.environ.setdefault(ERROR_REPORTING, "false")
        for variable in FOLDERS:
            os.environ.setdefault(variable, str(output.resolve() / "wandb"))
        self._session: Any = None

    def open(self, run: str | None) -> str:
        """Begin a session of the run."""
        import wandb

        number = run or secrets.token_hex(4)
        self._session = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self.study.name,
            id=number,
            resume="allow",
            dir=str(self.output),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=study_settings(self.study),
            settings=wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_git=True,
                x_disable_stats=True,
                x_disable_meta=True,
                init_timeout=START_SECONDS,
            ),
        )
        return number

    def send(self, record: RoundRecord) -> None:
        """Log a round's numbers; its number is the step."""
        self._session.log(round_numbers(record), step=record.round)

    def end(self, failed: bool) -> None:
        """End the session."""
        self._session.finish(exit_code=int(failed))
