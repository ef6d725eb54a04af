"""What several test files share: one thread, a tiny untrained base model, the brain modality."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from pydicom.uid import MRImageStorage, generate_uid

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.core.config import load_config
from ld_common.core.registry import Registry
from ld_common.core.state import State
from ld_common.imaging import readers
from ld_common.imaging.burned_in_text import check_burned_in_text
from ld_common.imaging.modality import Modality
from ld_simulations.benchmarks.scans.pictures import dataset_of
from tests.support.bases import make_base

if TYPE_CHECKING:
    from playwright.sync_api import Browser

BRAIN_MRI = Path(__file__).parent.parent / "configs/modalities/brain_mri.yaml"

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def every_package_may_be_loaded() -> Iterator[None]:
    """A deployed site limits its process to approved packages; no test passes such a limit on."""
    yield
    Registry.allow(None)


@pytest.fixture(autouse=True, scope="session")
def no_search_for_text() -> Iterator[None]:
    """The search for text in pixels takes a second an image and has tests of its own, which use `search_for_text`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "check_burned_in_text", lambda *_: None)
        yield


@pytest.fixture
def search_for_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels are searched for text, as everywhere but in the other tests."""
    monkeypatch.setattr(readers, "check_burned_in_text", check_burned_in_text)


@pytest.fixture(scope="session", autouse=True)
def account_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trusted keys and the key of input hashes lie in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained base: images of 32 pixels, latents `(4,8,8)`, prompts of 32 tokens of width 32."""
    return make_base(tmp_path_factory.mktemp("tiny_base"), 32)


@pytest.fixture(scope="session")
def smallest_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained base: images of 16 pixels, latents `(4,4,4)`, prompts of 32 tokens of width 32."""
    return make_base(tmp_path_factory.mktemp("smallest_base"), 16)


def random_state(state: State, deviation: float) -> State:
    """Tensors like an adapter's, the same whatever was drawn before."""
    generator = torch.Generator().manual_seed(0)
    return {name: deviation * torch.randn(value.shape, generator=generator) for name, value in state.items()}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium; the tests of a module are skipped where there is none."""
    from ld_simulations.benchmarks.seen.browser import CHROMIUM, chromium

    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install chromium to look at pages")
    with chromium() as launched:
        yield launched


@pytest.fixture(scope="session")
def brain_mri() -> Modality:
    """The modality of `configs/modalities/brain_mri.yaml`."""
    return load_config(Modality, BRAIN_MRI)


@pytest.fixture(scope="session")
def write_dicom() -> Callable[..., Path]:
    """A function that writes one axial MR slice with pydicom; keyword arguments replace header elements."""
    return write_mr_slice


def write_mr_slice(path: Path, pixels: np.ndarray, **elements: Any) -> Path:
    """Write uint16 or int16 `pixels` (H,W); an element given as None is left out.

    UIDs follow from the last four parts of the path, so that sites of several tests have equal files.
    """
    series = "/".join(path.parts[-4:-1])
    header: dict[str, Any] = {
        "SOPClassUID": MRImageStorage,
        "SOPInstanceUID": generate_uid(entropy_srcs=[f"{series}/{path.name}"]),
        "SeriesInstanceUID": generate_uid(entropy_srcs=[series]),
        "StudyInstanceUID": generate_uid(entropy_srcs=["study", series]),
        "Modality": "MR",
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "PatientID": "patient",
        "PatientName": "Planted^Name",
        "StudyDate": "20200101",
        "SeriesNumber": 1,
        "PixelSpacing": [2.0, 2.0],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [0, 0, 0],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": int(pixels.dtype == np.int16),
        "PixelData": pixels.tobytes(),
    }
    dataset = dataset_of(header | elements)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


SITE = """\
site: aster
modality: {modality}
base_model: {base}
store: store
batch_size: 4
policy: {{min_patients: 1, min_batch_size: 1, min_visits: 1, count_step: 1, drift_step: 0}}
data:
  root: scans
  table: visits.csv
  columns:
    patient: subject
    date: seen
    attributes: {{age: years, sex: gender, diagnosis: group}}
  values:
    sex: {{Female: F, Male: M}}
    diagnosis: {{Normal: CN, Dementia: AD}}
"""
HEADER = "subject,seen,years,gender,group"
PLANTED_ROWS = [  # names and dates that no store may hold
    "PLANTED-ANNA,2019-03-04,70,Female,Normal",
    "PLANTED-ANNA,2020-03-04,71,Female,Normal",
    "PLANTED-ANNA,2022-03-04,73,Female,Dementia",
    "PLANTED-BERT,2018-07-09,66,Male,Normal",
    "PLANTED-BERT,2021-07-09,69,Male,Normal",
    "PLANTED-CARL,2020-11-12,80,Male,Dementia",
]


BORN = {"PLANTED-BERT": "19520102", "PLANTED-CARL": "19400102"}
"""Birth dates of the headers; Anna's is that of all others."""


def write_visit(root: Path, patient: str, date: str, **elements: Any) -> list[Path]:
    """Write one visit's series of three slices, the middle one the brightest."""
    folder = root / patient.lower() / date
    rng = np.random.default_rng(sum(map(ord, patient + date)))
    files = []
    for number, height in enumerate((-5, 0, 5)):
        pixels = rng.integers(0, 500 if height else 1000, (24, 20)).astype(np.uint16)
        place = {"ImagePositionPatient": [0, 0, height], "PatientID": patient, "StudyDate": date.replace("-", "")}
        place |= {"PatientName": f"Family^{patient}", "PatientBirthDate": BORN.get(patient, "19490102")}
        files.append(write_mr_slice(folder / f"{number}.dcm", pixels, **(place | elements)))
    return files


def write_table(site: Path, rows: list[str], header: str = HEADER) -> None:
    """Replace the table of the site whose YAML file is `site`."""
    (site.parent / "visits.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def site_files(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a site with three patients and six visits, all of them usable; `site_yaml` hands out copies."""
    folder = tmp_path_factory.mktemp("site")
    site_file = folder / "site.yaml"
    site_file.write_text(SITE.format(modality=BRAIN_MRI, base=tiny_base))
    write_table(site_file, PLANTED_ROWS)
    for row in PLANTED_ROWS:
        write_visit(folder / "scans", *row.split(",")[:2])
    return folder


@pytest.fixture
def site_yaml(site_files: Path, tmp_path: Path) -> Path:
    """The YAML file of a site of the test's own, a copy of `site_files`."""
    shutil.copytree(site_files, tmp_path, dirs_exist_ok=True)
    return tmp_path / "site.yaml"
