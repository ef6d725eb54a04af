"""One small hospital with two test patients, and a release of random numbers to judge on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.config import from_mapping
from ld_common.diffusion.base_model import BaseModel, base_digest, load_base, load_denoiser
from ld_common.imaging.modality import Modality
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import (
    Release,
    ReleaseContent,
    find_release_base,
    load_release_base,
    read_release,
    write_release,
)
from ld_evaluate.dataset import EvaluationData, read_data
from ld_evaluate.judge import CounterfactualJudge
from ld_evaluate.options import JudgeConfig
from ld_simulations.hospitals import write_hospitals
from ld_simulations.hospitals_config import HospitalConfig, HospitalsConfig
from tests.conftest import random_state
from tests.support.ageing import mark_checked

FEW = JudgeConfig(cycles=2, cycled=1, predictor_steps=2)


@pytest.fixture(scope="session")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hospitals") / "one"
    hospitals = [HospitalConfig("aster", patients=4, test_patients=2)]
    written = write_hospitals(HospitalsConfig(output=str(folder), hospitals=hospitals))
    mark_checked(written / "scans.csv")
    return written


@pytest.fixture(scope="session")
def release_folder(tiny_base: Path, brain_mri: Modality, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {
        "base_model": str(tiny_base),
        "adapter": {"name": "lora", "rank": 2},
        "edit": {"num_inference_steps": 4},
    }
    study = from_mapping(StudyConfig, options)
    adapted = inject(load_denoiser(str(tiny_base)), read_adapter(study.adapter), study.seed)
    state = random_state(adapted.state(), 0.1)
    folder = tmp_path_factory.mktemp("release")
    return write_release(folder, study, brain_mri, ReleaseContent(base_digest(str(tiny_base)), state))


@pytest.fixture(scope="session")
def release(release_folder: Path) -> Release:
    return read_release(release_folder)


@pytest.fixture(scope="session")
def base(release: Release) -> BaseModel:
    """The base with the release's adapter."""
    return load_release_base(release)


@pytest.fixture(scope="session")
def data(hospital: Path, brain_mri: Modality) -> EvaluationData:
    return read_data(hospital / "held_out", brain_mri, 32)


@pytest.fixture(scope="session")
def judge(release: Release, data: EvaluationData) -> CounterfactualJudge:
    """Without reference scans."""
    return CounterfactualJudge(load_base(find_release_base(release)), data, None, FEW)
