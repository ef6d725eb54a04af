"""A run of MLflow, in `mlflow.db` of the run's folder unless MLFLOW_TRACKING_URI names a server."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

from ld_common.protocol.study_config import StudyConfig
from ld_server.round_log import RoundRecord
from ld_server.tracking.base import RemoteTracker, study_settings
from ld_server.tracking.numbers import round_numbers

DATABASE = "mlflow.db"
MAX_PARAMETER = 500
"""Characters of a parameter that every version of MLflow keeps."""
AT_ONCE = 100
"""Parameters of one request."""
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""A server that does not answer costs seconds, not minutes."""


class MlflowRun(RemoteTracker):
    """One run of the experiment that bears the study's name."""

    name = "mlflow"

    def __init__(self, study: StudyConfig, output: Path) -> None:
        super().__init__(study, output)
        for variable, value in DEFAULTS.items():
            os.environ.setdefault(variable, value)
        self._client: Any = None

    def open(self, run: str | None) -> str:
        """Connect, and continue or create the run."""
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        here = f"sqlite:///{(self.output / DATABASE).resolve()}"
        self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or here)
        if run is not None:
            self._client.update_run(run, status="RUNNING")
            return run
        experiment = self._client.get_experiment_by_name(self.study.name)
        number = self._client.create_experiment(self.study.name) if experiment is None else experiment.experiment_id
        created = str(self._client.create_run(number, run_name=self.study.name).info.run_id)
        parameters = [
            Param(key, str(value)[:MAX_PARAMETER]) for key, value in sorted(study_settings(self.study).items())
        ]
        for start in range(0, len(parameters), AT_ONCE):
            self._client.log_batch(created, params=parameters[start : start + AT_ONCE])
        return created

    def send(self, record: RoundRecord) -> None:
        """Log a round's numbers; its number is the step."""
        from mlflow.entities import Metric

        ended = int(datetime.datetime.fromisoformat(record.ended).timestamp() * 1000)
        metrics = [Metric(name, value, ended, record.round) for name, value in round_numbers(record).items()]
        for start in range(0, len(metrics), AT_ONCE):
            self._client.log_batch(self._run, metrics=metrics[start : start + AT_ONCE])

    def end(self, failed: bool) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")
