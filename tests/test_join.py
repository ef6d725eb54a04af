"""A study is provisioned, hospitals join it: what a kit holds, what is refused, what a site approves."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path

import pytest
import yaml
from flwr.proto.task_pb2 import Task
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult, LaunchResultStatus
from flwr.supercore.superexec.plugin.base_exec_plugin import BaseExecPlugin
from typer.testing import CliRunner

from ld_client.approvals import approve, check_approved, check_bundle, withdraw
from ld_client.approve import describe
from ld_client.cli import app as client
from ld_client.executor import approved_only
from ld_client.join import enrolment, join
from ld_client.site_home import SiteHome
from ld_common.errors import ApprovalError, ConfigError, DeploymentError, SignatureError
from ld_common.signing import new_study_key, public_line
from ld_common.site_kit import BUNDLE, FILES, MANIFEST, SIGNATURE, read_kit, write_kit
from ld_server.bundle import build_bundle
from ld_server.provision import check_bundle as check_installed
from ld_server.provision import provision, server_config, study_fingerprint, update
from ld_server.study_home import StudyHome

PORTS = ["hosts=[localhost]", "gate_port=19492", "release_port=19493", "link_port=19491"]


@pytest.fixture(scope="module")
def study(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("study") / "study.yaml"
    modality = Path(__file__).parent.parent / "configs/modalities/brain_mri.yaml"
    content = {
        "name": "joined",
        "base_model": str(tiny_base),
        "modality": str(modality),
        "federation": {"rounds": 2, "sites": ["aster", "birch"]},
    }
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture
def home(study: Path, tmp_path: Path) -> StudyHome:
    return provision(study, tmp_path / "server", server_config(PORTS))


@pytest.fixture
def site(home: StudyHome, site_yaml: Path) -> SiteHome:
    """A site that opened its kit and wrote its config."""
    path = home.path.parent / "aster"
    join(home.kits / "aster.kit", path, study_fingerprint(home))
    (path / "site.yaml").write_text(site_yaml.read_text())
    return SiteHome(path)


def test_a_home_holds_what_it_needs_and_keeps_its_keys_to_itself(home: StudyHome, study: Path) -> None:
    assert {file.name for file in home.kits.iterdir()} == {"aster.kit", "birch.kit"}
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in home.keys.iterdir())
    assert home.sites() == {}
    with pytest.raises(DeploymentError, match="already"):
        provision(study, home.path, server_config(PORTS))
    with pytest.raises(DeploymentError, match="ld-server provision"):
        StudyHome(home.path / "elsewhere").check()


def test_no_kit_holds_a_secret(home: StudyHome) -> None:
    secrets = [file.read_bytes() for file in home.keys.iterdir()]
    for file in home.kits.iterdir():
        kit = read_kit(file)
        parts = [kit.raw_manifest, *kit.files.values()]
        assert not any(
            b"PRIVATE KEY" in part and b"BEGIN PRIVATE" in part for part in parts if part != kit.files[BUNDLE]
        )
        assert not any(secret in part for secret in secrets for part in parts)
        assert str(home.path).encode() not in b"".join([kit.raw_manifest, kit.files["study.yaml"]])


def test_the_bundle_is_the_same_each_time_and_holds_no_server_code(home: StudyHome) -> None:
    assert home.bundle.read_bytes() == build_bundle()
    with zipfile.ZipFile(home.bundle) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {
        "ld_common",
        "ld_client",
        "study_server.py",
        "pyproject.toml",
        ".info",
    }
    assert "ld_client/app.py" in names
    check_installed(home)
    home.bundle.write_bytes(b"something else")
    with pytest.raises(DeploymentError, match="ld-server update"):
        check_installed(home)


@pytest.mark.parametrize("name", [MANIFEST, SIGNATURE, *FILES])
def test_a_kit_with_any_file_altered_is_refused(home: StudyHome, name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(home.kits / "aster.kit") as archive:
        files = {entry: archive.read(entry) for entry in archive.namelist()}
    content = files[name]
    files[name] = content.replace(b"localhost", b"evil.host") if name == MANIFEST else content[:-1] + b"#"
    with zipfile.ZipFile(tmp_path / "altered.kit", "w") as archive:
        for entry, value in files.items():
            archive.writestr(entry, value)
    with pytest.raises(DeploymentError):
        join(tmp_path / "altered.kit", tmp_path / "home")
    assert not (tmp_path / "home" / "site.key").exists()


def test_what_is_no_kit_is_refused(home: StudyHome, tmp_path: Path) -> None:
    file = tmp_path / "scan.kit"
    for content in (b"", b"no archive", (home.kits / "aster.kit").read_bytes()[:2000]):
        file.write_bytes(content)
        with pytest.raises(DeploymentError, match="no site kit"):
            join(file, tmp_path / "home")
    with pytest.raises(DeploymentError, match="no site kit"):
        join(tmp_path / "absent.kit", tmp_path / "home")


def test_a_kit_signed_by_another_is_told_by_its_fingerprint(home: StudyHome, tmp_path: Path) -> None:
    kit = read_kit(home.kits / "aster.kit")
    write_kit(tmp_path / "forged.kit", kit.manifest, kit.files, new_study_key())
    with pytest.raises(DeploymentError, match="do not use it"):
        join(tmp_path / "forged.kit", tmp_path / "home", study_fingerprint(home))


def test_joining_makes_a_key_of_its_own_and_a_config_to_fill_in(home: StudyHome, tmp_path: Path) -> None:
    lines = join(home.kits / "birch.kit", tmp_path / "birch")
    site = SiteHome(tmp_path / "birch")
    assert any(study_fingerprint(home) in line for line in lines)
    assert site.key_file.stat().st_mode & 0o777 == 0o600
    assert enrolment(site).startswith("ecdsa-sha2-nistp384 ")
    assert "\n" not in enrolment(site)
    assert site.kit() == read_kit(home.kits / "birch.kit").manifest
    assert site.site().site == "birch"
    assert site.study().digest() == site.kit().study_digest


def test_a_second_kit_keeps_key_and_config(home: StudyHome, site: SiteHome, study: Path, tmp_path: Path) -> None:
    key, config = site.key_file.read_bytes(), site.config_file.read_bytes()
    update(home)
    join(home.kits / "aster.kit", site.path)
    assert (site.key_file.read_bytes(), site.config_file.read_bytes()) == (key, config)
    with pytest.raises(DeploymentError, match="another site"):
        join(home.kits / "birch.kit", site.path)
    other = provision(study, tmp_path / "other", server_config(PORTS))
    with pytest.raises(DeploymentError, match="another public key"):
        join(other.kits / "aster.kit", site.path)


def test_a_file_of_an_unpacked_kit_cannot_be_changed_unseen(site: SiteHome) -> None:
    for name in (*FILES, MANIFEST):
        file = site.kit_folder / name
        content = file.read_bytes()
        file.write_bytes(content + b" \n#" if name != MANIFEST else content.replace(b"localhost", b"elsewhere"))
        with pytest.raises(DeploymentError):
            site.kit()
        file.write_bytes(content)
    assert site.kit().site == "aster"


def test_a_config_of_another_site_is_refused(site: SiteHome) -> None:
    site.config_file.write_text(site.config_file.read_text().replace("site: aster", "site: birch"))
    with pytest.raises(DeploymentError, match="the kit is for 'aster'"):
        site.site()


def test_nothing_runs_that_was_not_approved(site: SiteHome) -> None:
    kit, study = site.kit(), site.study()
    asked = (study.digest(), kit.base_digest, kit.modality_digest)
    with pytest.raises(ApprovalError, match="ld-client approve"):
        check_bundle(site, kit.bundle_digest)
    with pytest.raises(ApprovalError, match="ld-client approve"):
        check_approved(site, *asked)
    approve(site)
    check_bundle(site, kit.bundle_digest)
    check_approved(site, *asked)
    more = dataclasses.replace(study, training=dataclasses.replace(study.training, steps=study.training.steps + 1))
    for other in ((more.digest(), *asked[1:]), (asked[0], "0" * 64, asked[2]), (*asked[:2], "0" * 64)):
        with pytest.raises(ApprovalError):
            check_approved(site, *other)
    with pytest.raises(ApprovalError):
        check_bundle(site, "0" * 64)
    withdraw(site)
    with pytest.raises(ApprovalError):
        check_approved(site, *asked)
    site.approvals.write_text("{")
    with pytest.raises(ApprovalError, match="restore"):
        check_bundle(site, kit.bundle_digest)


def test_the_executor_launches_what_was_approved_and_nothing_else(site: SiteHome) -> None:
    launched: list[str] = []

    class Launcher:
        """Where Flower would start a process."""

        def launch(self, spec: ExecutionSpec) -> LaunchResult:
            launched.append(spec.token)
            return LaunchResult.accepted()

    plugin = approved_only(site)("127.0.0.1:1", True, None, False, executor=Launcher())  # type: ignore[arg-type]
    client, server = TaskType.CLIENT_APP.value, TaskType.SERVER_APP.value
    bundle = site.kit().bundle_digest
    early = plugin.launch_task("early", Task(task_id=1, type=client, fab_hash=bundle))
    approve(site)
    results = {
        "approved": plugin.launch_task("approved", Task(task_id=2, type=client, fab_hash=bundle)),
        "other": plugin.launch_task("other", Task(task_id=3, type=client, fab_hash="0" * 64)),
        "none": plugin.launch_task("none", Task(task_id=4, type=client)),
        "server": plugin.launch_task("server", Task(task_id=5, type=server, fab_hash=bundle)),
    }
    assert launched == ["approved"]
    failed = {early.status, *(result.status for name, result in results.items() if name != "approved")}
    assert failed == {LaunchResultStatus.FAILED}
    assert run_superexec.AutoExecPlugin.launch_task is BaseExecPlugin.launch_task  # what Flower would run instead


def test_approving_shows_what_runs_what_leaves_and_what_changed(home: StudyHome, site: SiteHome) -> None:
    first = "\n".join(describe(site))
    assert "byte for byte, what is installed here" in first
    assert "without differential privacy" in first
    approve(site)
    text = (home.path / "study.yaml").read_text()
    (home.path / "study.yaml").write_text(text.replace("rounds: 2", "rounds: 7"))
    update(home)
    join(home.kits / "aster.kit", site.path)
    second = "\n".join(describe(site))
    assert "-  rounds: 2" in second
    assert "+  rounds: 7" in second
    with pytest.raises(ApprovalError):
        check_approved(site, site.kit().study_digest, site.kit().base_digest, site.kit().modality_digest)


def test_code_that_differs_from_the_installed_is_shown(home: StudyHome, site: SiteHome, tmp_path: Path) -> None:
    kit, changed = read_kit(home.kits / "aster.kit"), tmp_path / "changed.fab"
    with zipfile.ZipFile(home.bundle) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + (b"import this\n" if name == "ld_client/train.py" else b""))
    key = home.key("study")
    write_kit(tmp_path / "changed.kit", kit.manifest, kit.files | {BUNDLE: changed.read_bytes()}, key)  # type: ignore[arg-type]
    join(tmp_path / "changed.kit", site.path)
    lines = describe(site)
    assert any("DIFFERS" in line for line in lines)
    assert any(line.strip() == "+import this" for line in lines)


def test_the_commands_say_one_line_for_a_mistake(home: StudyHome, tmp_path: Path) -> None:
    runner = CliRunner()
    for arguments in (["enroll"], ["approve"], ["start"]):
        result = runner.invoke(client, [*arguments, "--home", str(tmp_path / "nowhere")])
        assert isinstance(result.exception, DeploymentError | SignatureError)
    result = runner.invoke(client, ["init", str(home.kits / "aster.kit"), "--home", str(tmp_path / "aster")])
    assert result.exit_code == 0
    assert study_fingerprint(home) in result.output


def test_addresses_are_checked() -> None:
    for wrong in (["gate_port=0"], ["gate_port=9093"], ["hosts=[]"], ["port=1"]):
        with pytest.raises(ConfigError):
            server_config(wrong)


def test_the_list_of_sites_is_whole_or_refused(home: StudyHome) -> None:
    home.registry.write_text(json.dumps({"aster": {"public_key": public_line(new_study_key().public_key())}}))
    with pytest.raises(DeploymentError, match="restore"):
        home.sites()
