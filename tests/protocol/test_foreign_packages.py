"""Packages of others: digests, kits, approvals, and which entry points a deployed site's process may load."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from flwr.supercore.task_identity import TaskIdentity

from ld_client import client_app
from ld_client.deployment.approval_summary import summary_lines
from ld_client.deployment.approvals import allow_approved_packages, approvals, check_approved
from ld_client.deployment.approve import approve, withdraw
from ld_client.deployment.site_home import SiteHome
from ld_common.adapters.registry import ADAPTERS
from ld_common.core.config import from_mapping
from ld_common.core.errors import ApprovalError, ConfigError, DeploymentError
from ld_common.core.registry import Registry
from ld_common.editing.registry import EDITORS
from ld_common.metrics.registry import BIOMARKERS
from ld_common.protocol import messages
from ld_common.protocol.foreign_packages import SERVER, SITES, check_installed, installed_package
from ld_common.protocol.study_config import StudyConfig
from ld_server.aggregation import AGGREGATORS
from ld_server.deployment.study_packages import check_packages, study_packages, write_package_list
from tests.support.installed_package import NAME, install_example, write_record
from tests.support.site_homes import asked, make_home, node_of, task_of

OPTIONS = {
    "name": "foreign",
    "packages": [NAME],
    "adapter": {"name": "bias_only"},
    "training": {"steps": 1, "batch_size": 2},
    "federation": {"rounds": 1, "sites": ["aster", "birch"], "weighting": "equal"},
}


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower's processes set before an app runs."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on `sys.path` with the example package installed in it."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    install_example(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "ld_example"]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.mark.usefixtures("site_packages")
def test_an_installed_package_adds_one_of_each_kind() -> None:
    for registry, name in (
        (ADAPTERS, "bias_only"),
        (EDITORS, "delta_denoising_score"),
        (BIOMARKERS, "bright_area"),
        (AGGREGATORS, "geometric_median"),
    ):
        assert name in registry
        assert registry.package_of(name) == NAME
        assert callable(registry.load(name))


@pytest.mark.usefixtures("site_packages")
def test_the_limit_holds_for_every_table_and_names_the_package() -> None:
    Registry.allow(["another-package"])
    assert "bias_only" not in ADAPTERS
    for registry, name in ((ADAPTERS, "bias_only"), (AGGREGATORS, "geometric_median")):
        with pytest.raises(ConfigError, match=f"'{NAME}'.*packages"):
            registry.load(name)  # type: ignore[attr-defined]
    assert ADAPTERS.load("lora").name == "lora"
    Registry.allow(["LD.Example"])  # names compare as PEP 503 says
    assert "bias_only" in ADAPTERS


def test_the_digest_is_of_the_files_and_not_of_how_they_were_installed(site_packages: Path, tmp_path: Path) -> None:
    record = installed_package(NAME)
    assert (record.name, record.version, record.runs_at) == (NAME, "0.1.0", SITES)
    info = next(site_packages.glob("*.dist-info"))
    (info / "INSTALLER").write_text("uv\n")
    (info / "direct_url.json").write_text(json.dumps({"url": "file:///elsewhere", "dir_info": {}}))
    (site_packages / "ld_example/__pycache__").mkdir(exist_ok=True)
    (site_packages / "ld_example/__pycache__/adapter.cpython-311.pyc").write_bytes(b"compiled")
    with (info / "RECORD").open("a") as lines:
        lines.write("ld_example/__pycache__/adapter.cpython-311.pyc,,\n../../bin/ld-example,,\n")
    assert installed_package(NAME) == record
    source = site_packages / "ld_example/adapter.py"
    source.write_text(source.read_text() + "\n# changed\n")
    assert installed_package(NAME).sha256 != record.sha256
    with pytest.raises(ApprovalError, match="not the approved one"):
        check_installed([record])
    source.unlink()
    with pytest.raises(DeploymentError, match=r"adapter\.py"):
        installed_package(NAME)


def test_an_editable_or_absent_package_has_no_digest(site_packages: Path) -> None:
    info = next(site_packages.glob("*.dist-info"))
    (info / "direct_url.json").write_text(json.dumps({"url": "file:///x", "dir_info": {"editable": True}}))
    with pytest.raises(DeploymentError, match="editable"):
        installed_package(NAME)
    shutil.rmtree(info)
    with pytest.raises(DeploymentError, match="not installed"):
        installed_package(NAME)


@pytest.mark.usefixtures("site_packages")
def test_provisioning_refuses_what_the_study_does_not_list(tmp_path: Path) -> None:
    study = from_mapping(StudyConfig, {**OPTIONS, "packages": []})
    with pytest.raises(DeploymentError, match=f"'bias_only'.*{NAME}"):
        study_packages(study)
    median = {"name": "geometric_median"}
    federation = {"sites": ["a", "b", "c"], "min_train_nodes": 3, "aggregation": median}
    with pytest.raises(DeploymentError, match=f"'geometric_median'.*{NAME}"):
        study_packages(from_mapping(StudyConfig, {"federation": federation}))
    with pytest.raises(DeploymentError, match="not installed"):
        study_packages(from_mapping(StudyConfig, {"packages": ["no-such-package"]}))
    records = study_packages(from_mapping(StudyConfig, OPTIONS))
    assert [(record.name, record.runs_at) for record in records] == [(NAME, SITES)]
    write_package_list(tmp_path, records)
    check_packages(tmp_path, from_mapping(StudyConfig, OPTIONS))


def test_a_run_refuses_another_version_than_the_kits_list(site_packages: Path, tmp_path: Path) -> None:
    study = from_mapping(StudyConfig, OPTIONS)
    write_package_list(tmp_path, study_packages(study))
    (site_packages / "ld_example/aggregator.py").write_text("changed = True\n")
    with pytest.raises(DeploymentError, match=f"{NAME}.*ld-server update"):
        check_packages(tmp_path, study)


def test_a_package_of_aggregators_alone_runs_at_the_server(site_packages: Path) -> None:
    info = next(site_packages.glob("*.dist-info"))
    (info / "entry_points.txt").write_text("[latent_drift.aggregators]\nmine = ld_example.aggregator:GeometricMedian\n")
    write_record(site_packages, info)
    (record,) = study_packages(from_mapping(StudyConfig, {"packages": [NAME]}))
    assert record.runs_at == SERVER
    shutil.rmtree(info)
    check_installed([record])  # a site need not have it


@pytest.fixture
def home(site_packages: Path, site_yaml: Path, tmp_path: Path) -> SiteHome:
    """A site whose kit lists the example package; nothing is approved yet."""
    folder = tmp_path / "study"
    folder.mkdir()
    return make_home(folder, site_yaml, from_mapping(StudyConfig, OPTIONS))


def refusal(home: SiteHome) -> str | None:
    """The error sentence of a training task, or None when it was trained."""
    reply = client_app.app(asked(messages.pack_task(task_of(home)), "train"), node_of(home))
    return messages.unpack_error(reply.content)


def test_a_site_approves_a_package_and_trains_with_it(home: SiteHome) -> None:
    assert any(NAME in line and "0.1.0" in line for line in summary_lines(home))
    approve(home)
    assert [record.name for record in approvals(home)[-1].package_records] == [NAME]
    assert refusal(home) is None
    log = [json.loads(line) for line in home.audit_log.read_text().splitlines()]
    assert log[1]["details"]["packages"][0]["sha256"] == installed_package(NAME).sha256


@pytest.mark.attack
def test_a_site_refuses_a_package_that_changed_after_its_approval(home: SiteHome, site_packages: Path) -> None:
    approve(home)
    task = messages.pack_task(task_of(home))
    source = site_packages / "ld_example/adapter.py"
    source.write_text(source.read_text() + "\n# changed\n")
    reply = client_app.app(asked(task, "train"), node_of(home))
    assert messages.unpack_error(reply.content) == messages.ERROR_SENTENCES["approval"]
    assert Registry.allowed == frozenset()
    kit = home.kit()
    with pytest.raises(ApprovalError, match=NAME):
        check_approved(home, kit.study_digest, kit.base_digest, kit.modality_digest)
    with pytest.raises(ApprovalError, match=NAME):
        summary_lines(home)


@pytest.mark.usefixtures("site_packages")
@pytest.mark.attack
def test_a_deployed_site_loads_no_package_that_nobody_approved(home: SiteHome) -> None:
    allow_approved_packages(home)
    assert "bias_only" not in ADAPTERS
    approve(home)
    allow_approved_packages(home)
    assert "bias_only" in ADAPTERS
    withdraw(home)
    allow_approved_packages(home)
    assert "bias_only" not in ADAPTERS
    allow_approved_packages(None)  # a simulation
    assert "bias_only" in ADAPTERS


@pytest.mark.usefixtures("site_packages")
@pytest.mark.attack
def test_a_kit_whose_study_uses_an_unlisted_package_is_refused(site_yaml: Path, tmp_path: Path) -> None:
    """Whatever the server let pass: here a study with the adapter and without the list."""
    folder = tmp_path / "study"
    folder.mkdir()
    home = make_home(folder, site_yaml, from_mapping(StudyConfig, {**OPTIONS, "packages": []}))
    for review in (summary_lines, approve):
        with pytest.raises(ConfigError, match=NAME):
            review(home)


@pytest.mark.attack
def test_a_kit_that_hides_a_package_is_refused(home: SiteHome) -> None:
    study = yaml.safe_load(home.study_file.read_text())
    assert study["packages"] == [NAME]
    manifest = home.kit_folder / "kit.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "packages": []}))
    with pytest.raises(DeploymentError):  # the study's signature covers the list
        home.kit()
