"""`study.json` of a run's folder: the study as it runs there, for those who look at the folder later."""

from __future__ import annotations

import json
from pathlib import Path

from ld_common.core.atomic_files import write_bytes
from ld_common.core.config import to_mapping
from ld_common.core.errors import ConfigError, DeploymentError
from ld_common.protocol.study_config import StudyConfig, study_from_json

RUN_STUDY = "study.json"


def write_run_study(folder: Path, study: StudyConfig) -> None:
    """Replace the file; raises `CheckpointError`."""
    write_bytes(folder / RUN_STUDY, (json.dumps(to_mapping(study), indent=1) + "\n").encode())


def read_run_study(folder: Path) -> StudyConfig:
    """The study that runs or ran in a folder; raises `DeploymentError`."""
    path = folder / RUN_STUDY
    try:
        return study_from_json(path.read_text())
    except (OSError, ValueError, ConfigError) as error:
        raise DeploymentError(f"cannot read '{path}' ({error}): resume the run, which writes it again") from error
