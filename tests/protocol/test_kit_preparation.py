"""A site kit carries the files that its modality's `preprocessing` names, and no others."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import pytest
import yaml

from ld_client.deployment.join import join
from ld_client.deployment.site_home import SiteHome
from ld_common.core.config import load_config, to_mapping
from ld_common.core.errors import ConfigError, DeploymentError
from ld_common.imaging.modality import Modality
from ld_common.imaging.preparation.files import step_files
from ld_common.protocol.keys import new_signing_key
from ld_common.protocol.kit_archive import read_kit, write_kit
from ld_server.deployment.provision import provision, study_fingerprint
from ld_server.deployment.study_home import StudyHome, server_config
from tests.support.prepared_heads import brain, digest, write_volume

PORTS = ["hosts=[localhost]", "gate_port=19592", "release_port=19593", "link_port=19591"]


@pytest.fixture
def study(tiny_base: Path, brain_mri: Modality, tmp_path: Path) -> Path:
    template = write_volume(tmp_path / "study" / "template.nii.gz", *brain())
    steps = [{"step": "register", "template": template.name, "sha256": digest(template)}]
    (template.parent / "modality.yaml").write_text(yaml.safe_dump(to_mapping(brain_mri) | {"preprocessing": steps}))
    content = {
        "name": "prepared",
        "base_model": str(tiny_base),
        "modality": "modality.yaml",
        "federation": {"sites": ["aster", "birch"]},
    }
    (template.parent / "study.yaml").write_text(yaml.safe_dump(content))
    return template.parent / "study.yaml"


@pytest.fixture
def home(study: Path, tmp_path: Path) -> StudyHome:
    return provision(study, tmp_path / "server", server_config(PORTS)[0])


def test_a_site_finds_the_template_in_its_kit(study: Path, home: StudyHome, tmp_path: Path) -> None:
    join(home.kits / "aster.kit", tmp_path / "aster", study_fingerprint(home))
    site = SiteHome(tmp_path / "aster")
    there, here = (load_config(Modality, folder / "modality.yaml") for folder in (study.parent, site.kit_folder))
    assert here.digest() == there.digest() == site.kit().modality_digest
    assert step_files(here.preprocessing) == step_files(there.preprocessing)
    assert str(study.parent) not in (site.kit_folder / "modality.yaml").read_text()
    (site.kit_folder / "template.nii.gz").write_bytes(b"another")
    with pytest.raises(DeploymentError, match=r"template\.nii\.gz"):
        site.kit()


def test_a_study_whose_template_is_missing_makes_no_home(study: Path, tmp_path: Path) -> None:
    (study.parent / "template.nii.gz").unlink()
    with pytest.raises(ConfigError, match=r"template\.nii\.gz"):
        provision(study, tmp_path / "other", server_config(PORTS)[0])


@pytest.mark.attack
@pytest.mark.parametrize("name", ["../up.json", "a/b.nii", ".hidden.json", "run.py", "kit.json", "x" * 120 + ".bin"])
def test_a_kit_with_a_file_of_another_name_is_refused(home: StudyHome, name: str, tmp_path: Path) -> None:
    kit = read_kit(home.kits / "aster.kit")
    manifest = dataclasses.replace(kit.manifest, public_key="", files={})
    with pytest.raises(DeploymentError, match="files"):
        write_kit(tmp_path / "evil.kit", manifest, kit.files | {name: b"x"}, new_signing_key())


def test_what_the_manifest_does_not_list_is_left_in_the_archive(home: StudyHome) -> None:
    with zipfile.ZipFile(home.kits / "aster.kit", "a") as archive:
        archive.writestr("more.json", "{}")
    assert "more.json" not in read_kit(home.kits / "aster.kit").files
