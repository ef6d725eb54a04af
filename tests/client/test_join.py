"""A study is provisioned, hospitals join it: what a kit holds, what is refused, what a site approves."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from flwr.common.config import get_project_dir
from flwr.proto.control_pb2 import ListNodesResponse, RegisterNodeRequest, UnregisterNodeRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.task_pb2 import Task
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import LaunchResultStatus
from typer.testing import CliRunner

from ld_client.cli import app as client
from ld_client.deployment.approval_summary import summary_lines
from ld_client.deployment.approvals import approvals, approved_identity, check_approved, check_bundle
from ld_client.deployment.approve import approve, withdraw
from ld_client.deployment.audit_log import AuditLog
from ld_client.deployment.audit_verify import verify_home
from ld_client.deployment.bundle import read_bundle
from ld_client.deployment.executor import MOST_TASKS, Lives, approved_only
from ld_client.deployment.join import enrolment, join
from ld_client.deployment.launcher import ApprovedCode, silent_error
from ld_client.deployment.site_home import SiteHome
from ld_client.site_config import load_modality, load_site
from ld_common.core.config import from_mapping
from ld_common.core.errors import ApprovalError, ConfigError, DeploymentError, SignatureError
from ld_common.core.processes import free_port, stop_family
from ld_common.protocol.enrollment_kit import BUNDLE, FILES, MANIFEST, SIGNATURE
from ld_common.protocol.keys import new_elliptic_key, new_signing_key, public_line
from ld_common.protocol.kit_archive import read_kit, write_kit
from ld_common.protocol.site_keys import SiteKeys, enrolment_line, new_site_keys, public_keys, read_enrolment
from ld_common.protocol.site_name import check_site_name
from ld_common.protocol.study_config import StudyConfig
from ld_server.deployment import superlink
from ld_server.deployment.bundle import build_bundle
from ld_server.deployment.provision import (
    admit,
    provision,
    revoke,
    study_fingerprint,
    synchronize,
    update,
)
from ld_server.deployment.provision import check_bundle as check_installed
from ld_server.deployment.study_home import AdmittedSite, StudyHome, server_config

PORTS = ["hosts=[localhost]", "gate_port=19492", "release_port=19493", "link_port=19491"]


@pytest.fixture(scope="module")
def study(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("study") / "study.yaml"
    modality = Path(__file__).parents[2] / "configs/modalities/brain_mri.yaml"
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
    return provision(study, tmp_path / "server", server_config(PORTS)[0])


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
        provision(study, home.path, server_config(PORTS)[0])
    with pytest.raises(DeploymentError, match="ld-server provision"):
        StudyHome(home.path / "elsewhere").check()


@pytest.mark.slow
@pytest.mark.attack
def test_other_accounts_read_nothing_of_a_home_whatever_the_umask(study: Path, tmp_path: Path) -> None:
    server, site = tmp_path / "server", tmp_path / "aster"
    run = "import importlib, os, sys; os.umask(0); importlib.import_module(sys.argv.pop(1)).main()"
    made = ["ld_server.cli", "provision", str(study), "--home", str(server), *PORTS]
    subprocess.run([sys.executable, "-c", run, *made], check=True, capture_output=True)
    fingerprint = study_fingerprint(StudyHome(server))
    opened = ["ld_client.cli", "init", str(server / "kits/aster.kit"), "--home", str(site)]
    subprocess.run([sys.executable, "-c", run, *opened, "--fingerprint", fingerprint], check=True, capture_output=True)
    places = [place for home in (server, site) for place in (home, *home.rglob("*"))]
    assert len(places) > 20
    assert {place for place in places if place.stat().st_mode & 0o077} == set()


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
        "LICENSE",
        ".info",
    }
    assert "ld_client/client_app.py" in names
    check_installed(home)
    home.bundle.write_bytes(b"something else")
    with pytest.raises(DeploymentError, match="ld-server update"):
        check_installed(home)


@pytest.mark.parametrize("name", [MANIFEST, SIGNATURE, *FILES])
@pytest.mark.attack
def test_a_kit_with_any_file_altered_is_refused(home: StudyHome, name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(home.kits / "aster.kit") as archive:
        files = {entry: archive.read(entry) for entry in archive.namelist()}
    content = files[name]
    files[name] = content.replace(b"localhost", b"evil.host") if name == MANIFEST else content[:-1] + b"#"
    with zipfile.ZipFile(tmp_path / "altered.kit", "w") as archive:
        for entry, value in files.items():
            archive.writestr(entry, value)
    with pytest.raises(DeploymentError):
        join(tmp_path / "altered.kit", tmp_path / "home", study_fingerprint(home))
    assert not (tmp_path / "home" / "site.key").exists()


@pytest.mark.attack
def test_what_is_no_kit_is_refused(home: StudyHome, tmp_path: Path) -> None:
    file = tmp_path / "scan.kit"
    for content in (b"", b"no archive", (home.kits / "aster.kit").read_bytes()[:2000]):
        file.write_bytes(content)
        with pytest.raises(DeploymentError, match="not a site kit"):
            join(file, tmp_path / "home")
    with pytest.raises(DeploymentError, match="there is no file"):
        join(tmp_path / "absent.kit", tmp_path / "home")


@pytest.mark.attack
def test_a_kit_signed_by_another_is_told_by_its_fingerprint(home: StudyHome, tmp_path: Path) -> None:
    kit = read_kit(home.kits / "aster.kit")
    write_kit(tmp_path / "forged.kit", kit.manifest, kit.files, new_signing_key())
    with pytest.raises(DeploymentError, match="do not use it"):
        join(tmp_path / "forged.kit", tmp_path / "home", study_fingerprint(home))
    with pytest.raises(DeploymentError, match="by telephone"):
        join(tmp_path / "forged.kit", tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_joining_makes_a_key_of_its_own_and_a_config_to_fill_in(home: StudyHome, tmp_path: Path) -> None:
    join(home.kits / "birch.kit", tmp_path / "birch", study_fingerprint(home))
    site = SiteHome(tmp_path / "birch")
    assert {file.stat().st_mode & 0o777 for file in site.keys.iterdir()} == {0o600}
    assert read_enrolment(enrolment(site)) == ("birch", site.public_keys())
    assert "\n" not in enrolment(site)
    assert site.kit() == read_kit(home.kits / "birch.kit").manifest
    assert site.site().site == "birch"
    assert site.study().digest() == site.kit().study_digest


def test_a_second_kit_keeps_key_and_config(home: StudyHome, site: SiteHome, study: Path, tmp_path: Path) -> None:
    keys, config = site.public_keys(), site.config_file.read_bytes()
    update(home)
    join(home.kits / "aster.kit", site.path)
    assert (site.public_keys(), site.config_file.read_bytes()) == (keys, config)
    with pytest.raises(DeploymentError, match="another site"):
        join(home.kits / "birch.kit", site.path)
    other = provision(study, tmp_path / "other", server_config(PORTS)[0])
    with pytest.raises(DeploymentError, match="another public key"):
        join(other.kits / "aster.kit", site.path)


@pytest.mark.attack
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


@pytest.mark.attack
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

    def launch(arguments: list[str], token: str) -> Lives:
        assert token not in " ".join(arguments)  # other accounts see command lines
        launched.append(token)
        return lambda: False

    plugin = approved_only(site, launch)("127.0.0.1:1", True, None, False, executor=None)  # type: ignore[arg-type]
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


@pytest.mark.attack
def test_few_tasks_wait_at_a_site(site: SiteHome) -> None:
    approve(site)
    alive: dict[int, bool] = {}

    def launch(arguments: list[str], token: str) -> Lives:
        number = len(alive)
        alive[number] = True
        return lambda: alive[number]

    plugin = approved_only(site, launch)("127.0.0.1:1", True, None, False, executor=None)  # type: ignore[arg-type]
    task = Task(task_id=1, type=TaskType.CLIENT_APP.value, fab_hash=site.kit().bundle_digest)
    answers = [plugin.launch_task("token", task).status for _ in range(MOST_TASKS + 2)]
    assert answers == [LaunchResultStatus.ACCEPTED] * MOST_TASKS + [LaunchResultStatus.FAILED] * 2
    alive[1] = False
    assert plugin.launch_task("token", task).status is LaunchResultStatus.ACCEPTED
    assert plugin.launch_task("token", task).status is LaunchResultStatus.FAILED


@pytest.mark.attack
def test_the_launcher_believes_bytes_and_unpacks_them_afresh(site: SiteHome) -> None:
    bundle, code = (site.kit_folder / BUNDLE).read_bytes(), ApprovedCode(site)
    with pytest.raises(ApprovalError):
        code.unpack(bundle, skip_prompt=True)
    approve(site)
    with pytest.raises(ApprovalError):
        code.unpack(bundle + b"\0", skip_prompt=True)
    assert not site.code_folders.exists()
    (site.code_folders / "left by nobody").mkdir(parents=True)
    folder = code.unpack(bundle, skip_prompt=True)
    assert list(site.code_folders.iterdir()) == [folder]
    (folder / "ld_client" / "train.py").write_text("half of a fi")
    (folder / "ld_client" / "planted.py").write_text("")
    (folder / "ld_common" / "diffusion" / "drift.py").unlink()
    assert code.unpack(bundle, skip_prompt=True) == folder
    found = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert found == read_bundle(bundle)


@pytest.mark.attack
def test_the_launcher_loads_what_it_unpacked_whatever_the_server_calls_it(
    site: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's path is `apps/PUBLISHER.NAME.VERSION.HASH8`; its words come from the server."""
    bundle, code = (site.kit_folder / BUNDLE).read_bytes(), ApprovedCode(site)
    with pytest.raises(ApprovalError, match="unpacked"):
        code.locate("latent-drift/latent-drift-study", "1", "")
    approve(site)
    folder, digest = code.unpack(bundle), hashlib.sha256(bundle).hexdigest()
    project = tomllib.loads(read_bundle(bundle)["pyproject.toml"].decode())["project"]
    own = (f"latent-drift/{project['name']}", project["version"], digest)
    assert code.locate(*own) == folder
    planted = site.path.parent / f"planted.{digest[:8]}"
    (planted / "ld_client").mkdir(parents=True)
    (planted / "pyproject.toml").write_bytes(read_bundle(bundle)["pyproject.toml"])
    (planted / "ld_client" / "client_app.py").write_text("raise SystemExit('planted code ran')")
    monkeypatch.setenv("FLWR_HOME", str(site.path / "flower"))
    climbing = f"{own[1]}.{digest[:8]}/../../../../planted"
    (site.path / "flower" / "apps" / f"latent-drift.{project['name']}.{own[1]}.{digest[:8]}").mkdir(parents=True)
    assert get_project_dir(own[0], climbing, digest).samefile(planted)  # where Flower would look
    wrong = [(own[0], climbing, digest), (own[0], "9", digest), ("a/b", own[1], digest), (*own[:2], "0" * 64)]
    wrong += [("latent-drift/../x", own[1], digest), ("", "", "")]
    for words in wrong:
        with pytest.raises(ApprovalError, match="refused"):
            code.locate(*words)
        with pytest.raises(ApprovalError, match="refused"):
            code.loader(default_app_ref="", app_path=None, multi_app=True)(*words)


@pytest.mark.attack
def test_an_error_before_the_wall_leaves_without_its_text() -> None:
    error = silent_error(code=2, reason="No module named 'jane_doe'")
    assert (error.code, "jane" in error.reason) == (2, False)


@pytest.mark.attack
def test_only_the_last_approval_counts(home: StudyHome, site: SiteHome) -> None:
    approve(site)
    first = site.kit()
    text = (home.path / "study.yaml").read_text()
    (home.path / "study.yaml").write_text(text.replace("rounds: 2", "rounds: 7"))
    update(home)
    join(home.kits / "aster.kit", site.path)
    approve(site)
    with pytest.raises(ApprovalError):
        check_approved(site, first.study_digest, first.base_digest, first.modality_digest)
    check_approved(site, site.kit().study_digest, first.base_digest, first.modality_digest)


@pytest.mark.attack
def test_what_is_approved_is_what_was_shown(home: StudyHome, site: SiteHome, tmp_path: Path) -> None:
    """Neither hashes of another study, nor another kit opened meanwhile, nor a list that others may write."""
    kit, key, seen = read_kit(home.kits / "aster.kit"), home.key("study"), site.kit()
    wicked = dataclasses.replace(site.study(), seed=666).digest()
    write_kit(tmp_path / "x.kit", dataclasses.replace(kit.manifest, study_digest=wicked), kit.files, key)  # type: ignore[arg-type]
    join(tmp_path / "x.kit", site.path)
    for look in (summary_lines, approve):
        with pytest.raises(ApprovalError, match="another version of this software"):
            look(site)
    with pytest.raises(ApprovalError, match="replaced"):
        approve(site, seen)
    join(home.kits / "aster.kit", site.path)
    approve(site, seen)
    assert site.approvals.stat().st_mode & 0o777 == 0o600
    site.approvals.chmod(0o666)
    with pytest.raises(ApprovalError, match="others may write"):
        check_bundle(site, seen.bundle_digest)


def test_a_kit_that_was_opened_half_way_can_be_opened_again(home: StudyHome, site: SiteHome) -> None:
    (site.kit_folder / "study.yaml").write_text("half")
    shutil.rmtree(site.path / "kit.new", ignore_errors=True)
    (site.path / "kit.new").mkdir()
    join(home.kits / "aster.kit", site.path)
    assert site.kit() == read_kit(home.kits / "aster.kit").manifest


@pytest.mark.slow
def test_approving_shows_what_runs_what_leaves_and_what_changed(home: StudyHome, site: SiteHome) -> None:
    first = "\n".join(summary_lines(site))
    assert "byte for byte" in first
    assert "never imported" not in first
    assert "without differential privacy" in first
    for name, config in load_modality(load_site(site.config_file)).attributes.items():
        (line,) = [line for line in first.splitlines() if line.startswith(f"  each round, of {name}: ")]
        assert all(word in line for word in config.categories)
    study = yaml.safe_load(first[first.index("  the whole study") :].partition("\n")[2].partition("\n\n")[0])
    assert from_mapping(StudyConfig, study) == site.study()
    approve(site)
    assert "the whole study" not in "\n".join(summary_lines(site))
    text = (home.path / "study.yaml").read_text()
    (home.path / "study.yaml").write_text(text.replace("rounds: 2", "rounds: 7"))
    update(home)
    join(home.kits / "aster.kit", site.path)
    second = "\n".join(summary_lines(site))
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
    lines = summary_lines(site)
    assert any("DIFFERS" in line for line in lines)
    assert any(line.strip() == "+import this" for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("torch.py", b"import os"),
        ("ld_client/train.pyc", b""),
        ("ld_client/native.so", b""),
        ("ld_client/../torch.py", b""),
        ("/torch.py", b""),
        ("ld_common/sub/torch/__init__.py", b"unused = 1\n"),
        ("sitecustomize.py", b""),
        ("ld_client\\train.py", b""),
        ("ld_client/train.py", b"twice"),
        ("pyproject.toml", b"[tool.flwr.app.components]\nclientapp = 'torch:app'\n"),
        ("pyproject.toml", b"not toml ["),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.attack
def test_a_bundle_with_anything_else_in_it_cannot_be_approved(
    home: StudyHome, site: SiteHome, tmp_path: Path, name: str, content: bytes
) -> None:
    kit, changed, key = read_kit(home.kits / "aster.kit"), tmp_path / "changed.fab", home.key("study")
    with zipfile.ZipFile(home.bundle) as old, zipfile.ZipFile(changed, "w") as new:
        for one in old.namelist():
            if one != name or name != "pyproject.toml":
                new.writestr(one, old.read(one))
        new.writestr(name, content)
    write_kit(tmp_path / "changed.kit", kit.manifest, kit.files | {BUNDLE: changed.read_bytes()}, key)  # type: ignore[arg-type]
    join(tmp_path / "changed.kit", site.path)
    if name == "ld_common/sub/torch/__init__.py":  # a module of our own package shadows nothing
        lines = summary_lines(site)
        assert any(name in line for line in lines)
        assert any("never imported" in line for line in lines)
        return
    for look in (summary_lines, approve):
        with pytest.raises(ApprovalError, match=r"refused|cannot be read"):
            look(site)
    assert approvals(site) == []


@pytest.mark.attack
def test_nothing_of_a_difference_is_hidden(home: StudyHome, site: SiteHome, tmp_path: Path) -> None:
    """Neither control characters nor length nor line ends keep a change from the data manager's eyes."""
    kit, changed, key = read_kit(home.kits / "aster.kit"), tmp_path / "changed.fab", home.key("study")
    with zipfile.ZipFile(home.bundle) as old, zipfile.ZipFile(changed, "w") as new:
        for one in old.namelist():
            content = old.read(one)
            if one == "ld_client/client_app.py":
                content = b"".join(b"x%d = 1\n" % number for number in range(1000)) + content
            if one == "ld_client/train.py":
                content = content.replace(b"\n", b"\r\n", 1) + b"steal()  # \x1b[2K\x1b[1A \xe2\x80\xae \xff\n"
            new.writestr(one, content)
    write_kit(tmp_path / "changed.kit", kit.manifest, kit.files | {BUNDLE: changed.read_bytes()}, key)  # type: ignore[arg-type]
    join(tmp_path / "changed.kit", site.path)
    lines = summary_lines(site)
    assert all(line.isprintable() for line in lines)
    assert {"    ld_client/client_app.py", "    ld_client/train.py"} <= set(lines)
    whole = (site.path / "approved" / "installed.diff").read_text()
    assert "+x999 = 1" in whole
    assert "steal()  # \\x1b[2K\\x1b[1A \\u202e \\xff" in whole
    assert "\\r" in whole


def test_the_commands_say_one_line_for_a_mistake(home: StudyHome, tmp_path: Path) -> None:
    runner = CliRunner()
    for arguments in (["enroll"], ["approve"], ["start"]):
        result = runner.invoke(client, [*arguments, "--home", str(tmp_path / "nowhere")])
        assert isinstance(result.exception, DeploymentError | SignatureError)
    init = ["init", str(home.kits / "aster.kit"), "--home", str(tmp_path / "aster")]
    assert isinstance(runner.invoke(client, init).exception, DeploymentError)
    result = runner.invoke(client, [*init, "--fingerprint", study_fingerprint(home)])
    assert result.exit_code == 0
    assert "next: fill in" in result.output


def test_addresses_are_checked() -> None:
    for wrong in (["gate_port=0"], ["gate_port=9093"], ["hosts=[]"]):
        with pytest.raises(ConfigError):
            server_config(wrong)


def test_a_setting_of_neither_server_nor_study_is_named(study: Path, tmp_path: Path) -> None:
    server, overrides = server_config(["port=1"])
    with pytest.raises(ConfigError, match="'port'"):
        provision(study, tmp_path / "server", server, overrides)


@pytest.mark.parametrize(
    "host",
    [
        "study.example.org:9092",
        "https://study.example.org",
        "study.example.org/x",
        "[::1]",
        "10.0.0.256",
        "10.0.0",
        "two words",
        "under_score.org",
        "-dash.org",
        "a..b",
        "x" * 64,
        ".".join(["label"] * 50),
        "straße.de",
        "''",
    ],
)
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="hosts"):
        server_config([f"hosts=['{host}']" if host != "''" else "hosts=['']"])


def test_names_of_any_length_and_hosts_of_any_kind_can_be_provisioned(study: Path, tmp_path: Path) -> None:
    long = ".".join(["label"] * 20)
    settings = server_config([f"hosts=['::1',Klinik-Köln.de,{long},10.0.0.7]"])[0]
    assert settings.hosts == ["::1", "xn--klinik-kln-lcb.de", long, "10.0.0.7"]
    home = provision(study, tmp_path / "server", settings, [f"name={'ü' * 100}"])
    names, addresses = alternatives(home)
    assert {"xn--klinik-kln-lcb.de", long, "localhost"} == set(names)
    assert {"::1", "10.0.0.7", "127.0.0.1"} == addresses
    assert read_kit(home.kits / "aster.kit").manifest.server == "[::1]:9092"
    provision(study, tmp_path / "other", server_config([f"hosts=[{long}]"])[0])


def alternatives(home: StudyHome) -> tuple[set[str], set[str]]:
    """Names and addresses of the server's certificate."""
    certificate = x509.load_pem_x509_certificate(home.certificate("server").read_bytes())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(found.get_values_for_type(x509.DNSName)), set(map(str, found.get_values_for_type(x509.IPAddress)))


def test_a_site_name_has_at_most_64_letters() -> None:
    check_site_name("a" * 64)
    with pytest.raises(ConfigError, match="at most 64"):
        check_site_name("a" * 65)


def test_updating_renews_the_servers_certificate(home: StudyHome) -> None:
    key, authority = (home.keys / "server.key").read_bytes(), home.certificate("authority").read_bytes()
    file = home.path / "server.yaml"
    file.write_text(file.read_text().replace("- localhost", "- moved.example.org"))
    update(home)
    assert "moved.example.org" in alternatives(home)[0]
    certificate = x509.load_pem_x509_certificate(home.certificate("server").read_bytes())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
    assert certificate.public_key() == home.key("server").public_key()
    assert (home.keys / "server.key").read_bytes() == key
    assert home.certificate("authority").read_bytes() == authority
    assert read_kit(home.kits / "aster.kit").manifest.server == "moved.example.org:19492"


class FakeLink:
    """The nodes of a SuperLink: one that was unregistered stays, and its key is never taken again."""

    def __init__(self) -> None:
        self.nodes: list[NodeInfo] = []
        self.refuses = False

    def ListNodes(self, request: object) -> ListNodesResponse:
        return ListNodesResponse(nodes_info=self.nodes)

    def RegisterNode(self, request: RegisterNodeRequest) -> None:
        if self.refuses or any(node.public_key == request.public_key for node in self.nodes):
            raise DeploymentError("Flower's SuperLink refuses")
        self.nodes.append(NodeInfo(node_id=len(self.nodes), public_key=request.public_key, status="registered"))

    def UnregisterNode(self, request: UnregisterNodeRequest) -> None:
        assert self.nodes[request.node_id].status != "unregistered"
        self.nodes[request.node_id].status = "unregistered"

    def let_in(self) -> set[bytes]:
        """Keys of nodes that Flower lets in."""
        return {node.public_key for node in self.nodes if node.status != "unregistered"}


@pytest.fixture
def fake_link(monkeypatch: pytest.MonkeyPatch) -> FakeLink:
    fake = FakeLink()
    monkeypatch.setattr(superlink, "control", lambda home: nullcontext(fake))
    return fake


def enrolled(name: str) -> tuple[str, SiteKeys]:
    """What a site with new keys sends, and the keys."""
    private = new_site_keys()
    keys = public_keys(private)
    return enrolment_line(name, keys, private["signing"]), keys  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["authority", "server"])
@pytest.mark.usefixtures("fake_link")
def test_a_site_may_be_called_as_the_studys_own_certificates(study: Path, tmp_path: Path, name: str) -> None:
    home = provision(study, tmp_path / "server", server_config(PORTS)[0], [f"federation.sites=[{name},birch]"])
    before = {file: file.read_bytes() for file in (home.certificate("authority"), home.certificate("server"))}
    line, keys = enrolled(name)
    admit(home, name, line)
    assert {file: file.read_bytes() for file in before} == before
    assert x509.load_pem_x509_certificate(home.site_certificate(name).read_bytes()).public_key() == keys.certificate_key


@pytest.mark.attack
def test_no_key_is_at_flower_that_is_not_on_the_list(home: StudyHome, fake_link: FakeLink) -> None:
    (first, first_keys), (second, second_keys) = enrolled("aster"), enrolled("aster")
    fake_link.refuses = True
    with pytest.raises(DeploymentError, match="refuses"):
        admit(home, "aster", first)
    assert home.sites()["aster"].keys == first_keys
    assert home.site_certificate("aster").exists()
    fake_link.refuses = False
    synchronize(home)
    assert fake_link.let_in() == {superlink.pem(first_keys.node_key)}
    with pytest.raises(DeploymentError, match="admitted with other keys"):
        admit(home, "aster", second)
    admit(home, "aster", second, replace=True)
    assert fake_link.let_in() == {superlink.pem(second_keys.node_key)}
    stray = new_elliptic_key().public_key()
    superlink.register_node(fake_link, stray)  # type: ignore[arg-type]
    synchronize(home)
    assert fake_link.let_in() == {superlink.pem(second_keys.node_key)}


@pytest.mark.attack
def test_a_revoked_key_cannot_come_back(
    home: StudyHome, fake_link: FakeLink, capsys: pytest.CaptureFixture[str]
) -> None:
    revoked_key_stays_out(home)
    restored = {"aster": AdmittedSite("aster", enrolled("aster")[1], "2026-01-01T00:00:00+00:00")}
    superlink.register_node(fake_link, restored["aster"].keys.node_key)  # type: ignore[arg-type]
    superlink.unregister_node(fake_link, restored["aster"].keys.node_key)  # type: ignore[arg-type]
    home.write_sites(restored)
    synchronize(home)  # says so, and the server starts for the others
    assert "refuses site 'aster'" in capsys.readouterr().out
    assert fake_link.let_in() == set()


@pytest.mark.slow
@pytest.mark.attack
def test_flower_itself_does_not_take_a_revoked_key_back(study: Path, tmp_path: Path) -> None:
    home = provision(study, tmp_path / "server", server_config([f"link_port={free_port()}"])[0])
    process = superlink.start_link(home)
    try:
        revoked_key_stays_out(home)
    finally:
        stop_family(process.pid)


def revoked_key_stays_out(home: StudyHome) -> None:
    """Admit and revoke a site, each twice; then try to come back with keys that are out."""
    (first, _), (second, keys) = enrolled("aster"), enrolled("aster")
    for _ in range(2):
        admit(home, "aster", first)
    for _ in range(2):
        revoke(home, "aster")
    with pytest.raises(DeploymentError, match="the site makes new ones"):
        admit(home, "aster", first)
    admit(home, "aster", second)
    with pytest.raises(DeploymentError, match="the site makes new ones"):
        admit(home, "aster", first)
    site = home.sites()["aster"]
    assert (site.keys, site.revoked) == (keys, None)
    with superlink.control(home) as client:
        assert [node.status for node in superlink.nodes(client)] == ["unregistered", "registered"]


@pytest.mark.usefixtures("fake_link")
@pytest.mark.attack
def test_a_line_of_another_site_is_not_taken(home: StudyHome, tmp_path: Path) -> None:
    join(home.kits / "birch.kit", tmp_path / "birch", study_fingerprint(home))
    line = enrolment(SiteHome(tmp_path / "birch"))
    with pytest.raises(DeploymentError, match="printed by site 'birch'"):
        admit(home, "aster", line)
    assert admit(home, "birch", line).name == "birch"


def test_a_new_key_begins_a_log_of_its_own(home: StudyHome, tmp_path: Path) -> None:
    site = SiteHome(tmp_path / "aster")
    join(home.kits / "aster.kit", site.path, study_fingerprint(home))
    head = AuditLog.of(site).append("asked", {})
    written = site.audit_log.read_bytes()
    shutil.rmtree(site.keys)
    lines = join(home.kits / "aster.kit", site.path)
    (former,) = site.path.glob("audit-until-*.jsonl")
    assert former.read_bytes() == written
    assert any(former.name in line for line in lines)
    assert AuditLog.of(site).append("asked", {}).sequence == head.sequence
    assert verify_home(site).problems == []


def test_settings_are_of_the_server_or_of_the_study(study: Path, tmp_path: Path) -> None:
    server, overrides = server_config([*PORTS, "hosts=study.example.org", "federation.rounds=7"])
    assert (server.hosts, server.is_local, overrides) == (["study.example.org"], False, ["federation.rounds=7"])
    assert provision(study, tmp_path / "other", server, overrides).study()[0].federation.rounds == 7
    assert server_config([])[0].is_local


def test_the_list_of_sites_is_whole_or_refused(home: StudyHome) -> None:
    home.registry.write_text(json.dumps({"aster": {"keys": {"signing": public_line(new_signing_key().public_key())}}}))
    with pytest.raises(DeploymentError, match="restore"):
        home.sites()


@pytest.mark.slow
@pytest.mark.attack
@pytest.mark.usefixtures("fake_link")
def test_a_secure_study_is_approved_only_with_the_keys_of_all_its_sites(
    study: Path, tmp_path: Path, site_yaml: Path
) -> None:
    names = ["aster", "birch", "cedar"]
    overrides = ["federation.sites=[aster,birch,cedar]", "federation.secure_aggregation=true"]
    overrides += ["federation.weighting=equal"]
    home = provision(study, tmp_path / "server", server_config(PORTS)[0], overrides)
    sites = {name: SiteHome(tmp_path / name) for name in names}
    for name, site in sites.items():
        join(home.kits / f"{name}.kit", site.path, study_fingerprint(home))
        (site.path / "site.yaml").write_text(site_yaml.read_text().replace("site: aster", f"site: {name}"))
    with pytest.raises(ApprovalError, match="lacks the keys of aster, birch, cedar"):
        approve(sites["aster"])
    for name in names[:2]:
        admit(home, name, enrolment(sites[name]))
    update(home)
    join(home.kits / "aster.kit", sites["aster"].path)
    with pytest.raises(ApprovalError, match="lacks the keys of cedar"):
        approve(sites["aster"])
    admit(home, "cedar", enrolment(sites["cedar"]))
    with pytest.raises(DeploymentError, match="lacks the present key of 'cedar'"):
        check_installed(home)
    update(home)
    check_installed(home)
    for name, site in sites.items():
        join(home.kits / f"{name}.kit", site.path)
        approve(site)
    shown = "\n".join(summary_lines(sites["birch"]))
    assert all(f"{name}: {site.public_keys().fingerprint}" in shown for name, site in sites.items())
    assert approved_identity(sites["birch"]).keys["cedar"] == sites["cedar"].signing_key().public_key()
    admit(home, "cedar", enrolled("cedar")[0], replace=True)
    update(home)
    join(home.kits / "birch.kit", sites["birch"].path)
    assert "NEW KEY since the last approval" in "\n".join(summary_lines(sites["birch"]))
    join(home.kits / "cedar.kit", sites["cedar"].path)
    with pytest.raises(ApprovalError, match="another key of 'cedar'"):
        approve(sites["cedar"])


@pytest.mark.attack
@pytest.mark.parametrize("change", ["cut", "other name", "other key", "unsigned"])
def test_an_enrolment_that_was_altered_is_refused(change: str) -> None:
    line, keys = enrolled("aster")
    start, name, content = line.split()
    fields = json.loads(base64.urlsafe_b64decode(content))
    if change == "other name":
        name = fields["site"] = "birch"
    elif change == "other key":
        fields["keys"]["node"] = enrolled("aster")[1].node
    elif change == "unsigned":
        fields["signature"] = ""
    content = base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()
    altered = f"{start} {name} {content[:-40] if change == 'cut' else content}"
    assert read_enrolment(line) == ("aster", keys)
    with pytest.raises(SignatureError):
        read_enrolment(altered)
