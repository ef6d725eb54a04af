"""A release carries the files that its modality's `preprocessing` needs, and repeats what index did."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml
from scipy import ndimage

from ld_client.data.ingest import Visit, read_visits, survey
from ld_client.site_config import load_modality, load_site
from ld_common.core.config import load_config, to_mapping
from ld_common.core.errors import ConfigError, ReleaseError
from ld_common.imaging.modality import Modality
from ld_common.imaging.readers import read_scan
from ld_common.release.release import read_release
from tests.support.prepared_heads import brain, digest, write_volume
from tests.support.releases import SOURCE, GenerateRunner, write_small_release

MOTION = np.array([[0.995, -0.0998, 0, 6], [0.0998, 0.995, 0, -4], [0, 0, 1, 3], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, brain_mri: Modality) -> Path:
    """A folder with a modality's file, its template, and a scan of a head that lies turned."""
    folder = tmp_path_factory.mktemp("study")
    voxels, affine = brain(thinned=2)
    template = write_volume(folder / "template.nii.gz", voxels, affine)
    steps = [
        {"step": "orient"},
        {"step": "bias_field"},
        {"step": "register", "template": template.name, "sha256": digest(template)},
    ]
    content = to_mapping(brain_mri) | {"preprocessing": steps}
    (folder / "modality.yaml").write_text(yaml.safe_dump(content))
    pull = np.linalg.inv(MOTION @ affine) @ affine
    moved = ndimage.affine_transform(voxels, pull[:3, :3], pull[:3, 3], order=1)
    write_volume(folder / "scans" / "P1.nii.gz", moved, affine)
    return folder


@pytest.fixture(scope="module")
def prepared_release(study: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Moved away from where it was written."""
    written = tmp_path_factory.mktemp("written") / "release"
    write_small_release(written, tiny_base, load_config(Modality, study / "modality.yaml"))
    return Path(shutil.move(written, tmp_path_factory.mktemp("moved") / "release"))


@pytest.mark.slow
def test_a_release_repeats_the_preparation_of_the_index(
    study: Path, prepared_release: Path, tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "visits.csv").write_text(
        "patient,date,age,sex,diagnosis,file\nP1,2020-01-01,74,F,CN,P1.nii.gz\n", encoding="utf-8"
    )
    site = {
        "site": "aster",
        "modality": str(study / "modality.yaml"),
        "base_model": str(tiny_base),
        "store": str(tmp_path / "store"),
        "data": {
            "root": str(study / "scans"),
            "table": str(tmp_path / "visits.csv"),
            "columns": {
                "patient": "patient",
                "date": "date",
                "file": "file",
                "attributes": {"age": "age", "sex": "sex", "diagnosis": "diagnosis"},
            },
        },
    }
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    config = load_site(tmp_path / "site.yaml")
    (visit,) = read_visits(survey(config, load_modality(config), bytes(32), lambda *_: None))
    assert isinstance(visit, Visit)
    released = read_release(prepared_release).modality
    scan = read_scan(study / "scans" / "P1.nii.gz", released, released=True)
    np.testing.assert_array_equal(scan.pixels, visit.scan.pixels)
    assert released.digest() == load_modality(config).digest()
    raw = read_scan(study / "scans" / "P1.nii.gz", released.as_in_files(), released=True)
    assert np.abs(raw.pixels - scan.pixels).max() > 100


def test_a_release_names_no_folder_and_checks_its_template(prepared_release: Path, tmp_path: Path) -> None:
    text = (prepared_release / "manifest.json").read_text()
    assert json.loads(text)["modality"]["preprocessing"][2]["template"] == "template.nii.gz"
    assert "preparation/template.nii.gz" in json.loads(text)["files"]
    copy = Path(shutil.copytree(prepared_release, tmp_path / "copy"))
    write_volume(copy / "preparation" / "template.nii.gz", *brain(scalp=True, thinned=2))
    with pytest.raises(ReleaseError, match="not the file that was released"):
        read_release(copy)


def test_a_study_without_its_template_writes_no_release(study: Path, tiny_base: Path, tmp_path: Path) -> None:
    shutil.copy(study / "modality.yaml", tmp_path)
    modality = load_config(Modality, tmp_path / "modality.yaml")
    with pytest.raises(ConfigError, match="template"):
        write_small_release(tmp_path / "release", tiny_base, modality)
    assert modality.digest() == load_config(Modality, study / "modality.yaml").digest()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["edit", "volume"])
def test_answers_lie_where_the_prepared_scan_does(
    command: str, run: GenerateRunner, study: Path, prepared_release: Path, tmp_path: Path
) -> None:
    scan, out = study / "scans" / "P1.nii.gz", tmp_path / "out"
    checked = ["--burned-in-text-checked", "--source", SOURCE, "--target", "age=84", "--out", out]
    code, printed = run(command, "--input", scan, *checked, release=prepared_release)
    assert code == 0, printed
    record = json.loads((out / "P1" / "record.json").read_text())
    assert [step["step"] for step in record["preparation"]] == ["orient", "bias_field", "register"]
    if command == "volume":
        answer, prepared = (nibabel.load(out / "P1" / name) for name in ("age-84.nii.gz", "prepared.nii.gz"))
        np.testing.assert_allclose(answer.affine, prepared.affine, atol=1e-3)
        np.testing.assert_allclose(answer.affine, record["input"]["voxels_to_mm"], atol=1e-3)
        np.testing.assert_allclose(answer.affine, MOTION @ brain(thinned=2)[1], atol=2)  # over the scan's own anatomy
        modality = read_release(prepared_release).modality.as_in_files()
        assert read_scan(out / "P1" / "prepared.nii.gz", modality, released=True).pixels.max() > 0


def test_other_software_still_reads_a_release_without_preparation(
    brain_mri: Modality, tiny_base: Path, tmp_path: Path
) -> None:
    folder = write_small_release(tmp_path / "release", tiny_base, brain_mri)
    content = json.loads((folder / "manifest.json").read_text())["modality"]
    assert "preprocessing" not in content and "head" not in content["image"]
    assert read_release(folder).modality == brain_mri
    assert dataclasses.replace(brain_mri, preprocessing=[]).digest() == brain_mri.digest()
