"""One release and one loaded model for all tests of `ld-generate`."""

from __future__ import annotations

from pathlib import Path

import pytest

from ld_common.diffusion.base_model import BaseModel
from ld_common.imaging.modality import Modality
from ld_common.release.release import load_release_base, read_release
from tests.support.releases import GenerateRunner, write_scan, write_small_release


@pytest.fixture(scope="session")
def release(tiny_base: Path, brain_mri: Modality, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_release(tmp_path_factory.mktemp("release"), tiny_base, brain_mri)


@pytest.fixture(scope="session")
def model(release: Path) -> BaseModel:
    return load_release_base(read_release(release))


@pytest.fixture(scope="session")
def informed(tiny_base: Path, model: BaseModel, brain_mri: Modality, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release that can tell familiar scans from others."""
    from tests.support.brains import write_familiar_release

    return write_familiar_release(tmp_path_factory.mktemp("informed"), tiny_base, model, brain_mri)


@pytest.fixture(scope="session")
def longitudinal(tiny_base: Path, brain_mri: Modality, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release with a longitudinal drift of random latents."""
    from tests.support.longitudinal import write_longitudinal_release

    return write_longitudinal_release(tmp_path_factory.mktemp("longitudinal"), tiny_base, brain_mri)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return write_scan(tmp_path / "scan.dcm")


@pytest.fixture
def run(
    release: Path, model: BaseModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> GenerateRunner:
    """Runs commands with the session's model in place of one that each loads."""
    monkeypatch.setattr("ld_generate.loading.load_release_base", lambda *_: model)
    return GenerateRunner(release, capsys)
