"""A small release, one loaded model for all commands of a session, and a way to run `ld-generate` in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.command import run_cli
from ld_common.core.config import from_mapping
from ld_common.diffusion.base_model import base_digest, load_denoiser
from ld_common.diffusion.drift import LatentDrift
from ld_common.imaging.modality import Modality
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import ReleaseContent, write_release
from ld_generate.cli import cli
from tests.conftest import random_state, write_mr_slice

SOURCE = "age=74,sex=F,diagnosis=CN"


def write_small_release(folder: Path, base: Path, modality: Modality) -> Path:
    """A LoRA of random weights with a drift and one site's drift; its editor takes three steps."""
    options: dict[str, Any] = {"base_model": str(base), "adapter": {"rank": 2}, "edit": {"num_inference_steps": 3}}
    options["drift"] = {"search": {"lowest": -0.1, "highest": 0.1, "spacing": 0.1}}
    study = from_mapping(StudyConfig, options)
    adapted = inject(load_denoiser(str(base)), read_adapter(study.adapter), study.seed)
    state = random_state(adapted.state(), 0.1)
    drift, other = (LatentDrift(torch.full((4, 1, 1), value)) for value in (0.5, 1.0))
    return write_release(
        folder, study, modality, ReleaseContent(base_digest(str(base)), state, drift, {"aster": other})
    )


def write_scan(path: Path, **elements: Any) -> Path:
    """An axial slice of 110 x 100 pixels with a block of noise in it."""
    pixels = np.zeros((110, 100), np.uint16)
    pixels[20:90, 20:80] = np.random.default_rng(0).integers(300, 900, (70, 60))
    return write_mr_slice(path, pixels, **({"PatientName": "Secret^Name", "PatientID": "SECRET-1"} | elements))


class GenerateRunner:
    """Runs `ld-generate` in this process with the session's release."""

    def __init__(self, release: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.release, self._capsys = release, capsys

    def __call__(self, command: str, *arguments: object, release: Path | None = None) -> tuple[int, str]:
        """Run a subcommand; returns the exit code and what both streams hold."""
        code, out, err = self.streams(command, *arguments, release=release)
        return code, out + err

    def streams(self, command: str, *arguments: object, release: Path | None = None) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        with pytest.raises(SystemExit) as ended:
            run_cli(cli, [command, str(release or self.release), *map(str, arguments), "--allow-unsigned"])
        captured = self._capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err
