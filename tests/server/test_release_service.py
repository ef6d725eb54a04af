"""Releases are issued, served to admitted sites and to nobody else, and pulled: real gRPC, real certificates."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.empty_pb2 import Empty
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import BytesValue, StringValue
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ld_client.cli import app
from ld_client.deployment.pull import pull
from ld_client.deployment.site_home import SiteHome
from ld_common.adapters.base import DRIFT
from ld_common.adapters.lora import PEFT_CONFIG, PEFT_WEIGHTS
from ld_common.core.command import run_cli
from ld_common.core.errors import DeploymentError, LdError, ReleaseError, SignatureError
from ld_common.protocol.keys import new_elliptic_key, new_signing_key
from ld_common.release.release import (
    ADAPTER,
    CARD,
    ENVELOPE,
    MANIFEST,
    SEALED,
    SEALED_SUFFIX,
    SIGNATURE,
    read_release,
    write_manifest,
)
from ld_common.release.service_messages import (
    CHUNK_BYTES,
    FETCH,
    LIST,
    MANIFEST_OF,
    MAX_MESSAGE_BYTES,
    SERVICE,
    FileRequest,
    Listed,
    file_request,
    listing,
    method,
)
from ld_common.release.signature import check_release, sign_release
from ld_server.deployment.certificates import certify_site, make_authority, pem
from ld_server.deployment.release_service import CALLS_OF_A_SITE, start_release_service
from ld_server.deployment.releases import run_release
from ld_server.deployment.study_home import StudyHome
from tests.conftest import BRAIN_MRI
from tests.support.deployed_study import DeployedStudy, free_port

WAIT = 10.0


@pytest.fixture
def study(tmp_path: Path) -> DeployedStudy:
    torch.manual_seed(0)
    made = DeployedStudy(tmp_path, "demo", BRAIN_MRI)
    made.train()
    return made


@pytest.fixture
def aster(study: DeployedStudy) -> SiteHome:
    return study.admit("aster")


@pytest.fixture
def serving(study: DeployedStudy) -> Iterator[DeployedStudy]:
    """A study whose release service runs."""
    server = start_release_service(study.home, study.address)
    yield study
    server.stop(0).wait()


def issue(study: DeployedStudy, *to: str, evaluation: Path | None = None) -> Path:
    """Issue the run's release; returns its folder at the server."""
    run_release(study.home.path, list(to), evaluation)
    return max((study.home.path / "releases").iterdir(), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def offered(channel: Any) -> Struct:
    call = channel.unary_unary(method(LIST), Empty.SerializeToString, Struct.FromString)
    return call(Empty(), timeout=WAIT)


def fetch(channel: Any, release: str, file: str, offset: Any = 0) -> bytes:
    call = channel.unary_stream(method(FETCH), Struct.SerializeToString, BytesValue.FromString)
    return b"".join(part.value for part in call(file_request(FileRequest(release, file, offset)), timeout=WAIT))


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """How a call was refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), error.details()


def pulled_line(capsys: pytest.CaptureFixture[str], home: SiteHome, *arguments: str) -> str:
    """The one line with which `ld-client pull` fails."""
    with pytest.raises(SystemExit) as ended:
        run_cli(app, ["pull", "--home", str(home.path), *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


# Issuing


def test_a_release_is_issued_signed_numbered_and_with_its_evaluation(study: DeployedStudy, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"copy_gain_db": 1.25, "patients": 24, "by_edit": {"a": 1}}))
    first, second = issue(study), issue(study, evaluation=tmp_path / "summary.json")
    assert [first.name, second.name] == ["demo-1", "demo-2"]
    manifest = check_release(second, [study.study_key.public_key()])
    assert manifest["evaluation"]["by_edit"] == {"a": 1}
    card = (second / CARD).read_text()
    assert "| copy_gain_db | 1.25 |" in card
    assert "| patients | 24 |" in card
    assert "Release 2 of this study" in card
    assert manifest["files"][ADAPTER] in card
    assert "evaluation" not in read_release(first).manifest
    assert not (study.home.run / "release" / SIGNATURE).exists()


def test_what_cannot_be_issued_is_refused_and_leaves_nothing(study: DeployedStudy, tmp_path: Path) -> None:
    study.admit("aster")
    study.admit("birch")
    study.revoke("birch")
    bad = tmp_path / "bad.json"

    def refused(error: type[LdError], words: str, to: list[str], evaluation: Path | None = None) -> None:
        with pytest.raises(error, match=words):
            run_release(study.home.path, to, evaluation)
        assert not list(study.home.path.glob("releases/*")) and not list(study.home.path.glob("releases/.*"))

    refused(DeploymentError, "'birch'.*aster", ["aster", "birch"])
    refused(DeploymentError, "'cedar' is not an admitted site", ["cedar"])
    refused(ReleaseError, "cannot read the evaluation", [], tmp_path / "none.json")
    for content in ("{", "[1]", '{"a": NaN}', '{"a": "' + "x" * 300_000 + '"}'):
        bad.write_text(content)
        refused(ReleaseError, "bad.json", [], bad)
    adapter = study.home.run / "release" / ADAPTER
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[:-1])
    refused(ReleaseError, "not the file that was released", [])
    adapter.write_bytes(whole)
    manifest = study.home.run / "release" / MANIFEST
    older = json.loads(manifest.read_text())
    del older["privacy"]
    manifest.write_text(json.dumps(older))
    refused(ReleaseError, "lacks 'privacy'", [])
    (study.home.path / "study.yaml").write_text("name: another\nmodality: modality.yaml\n")
    refused(ReleaseError, "'demo'.*'another'", [])
    with pytest.raises(DeploymentError, match="ld-server provision"):
        run_release(tmp_path / "nowhere", [], None)


# Pulling


def test_a_site_pulls_the_newest_release_or_the_one_it_names(serving: DeployedStudy, aster: SiteHome) -> None:
    first = issue(serving)
    said = pull(aster, "", None)
    folder = aster.path / "releases" / "demo-1"
    assert {path.name for path in folder.iterdir()} == {
        ADAPTER,
        PEFT_WEIGHTS,
        PEFT_CONFIG,
        DRIFT,
        MANIFEST,
        CARD,
        SIGNATURE,
    }
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in first.iterdir())
    assert str(folder) in said[0]
    assert "--trust" in said[-1]
    serving.train()
    second = issue(serving)
    pull(aster, "", None)
    assert (aster.path / "releases" / "demo-2" / ADAPTER).read_bytes() == (second / ADAPTER).read_bytes()
    pull(aster, "demo-1", aster.path / "elsewhere")
    assert (aster.path / "elsewhere" / ADAPTER).read_bytes() == (first / ADAPTER).read_bytes()
    assert "already" in pull(aster, "demo-1", None)[0]
    with pytest.raises(ReleaseError, match="there are demo-1, demo-2"):
        pull(aster, "demo-3", None)
    with pytest.raises(ReleaseError, match="exists and is not this release"):
        pull(aster, "demo-2", aster.path / "elsewhere")


def test_a_release_for_named_sites_opens_there_and_nowhere_else(serving: DeployedStudy, aster: SiteHome) -> None:
    birch = serving.admit("birch")
    folder = issue(serving, "aster")
    sealed = {name + SEALED_SUFFIX for name in (ADAPTER, PEFT_WEIGHTS, DRIFT)}
    assert {path.name for path in folder.iterdir()} == {MANIFEST, SIGNATURE, CARD, PEFT_CONFIG, ENVELOPE, *sealed}
    pull(aster, "", None)
    release = aster.path / "releases" / "demo-1"
    assert (release / ADAPTER).read_bytes() == (serving.home.run / "release" / ADAPTER).read_bytes()
    check_release(release, [serving.study_key.public_key()])
    assert read_release(release).study.name == "demo"
    with pytest.raises(ReleaseError, match="encrypted to aster, not to 'birch'"):
        pull(birch, "", None)
    assert not (birch.path / "releases" / "demo-1").exists()


def test_no_release_yet_and_a_server_that_is_down_are_one_line_each(
    study: DeployedStudy, aster: SiteHome, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no connection to" in pulled_line(capsys, aster)
    server = start_release_service(study.home, study.address)
    try:
        assert "no release yet" in pulled_line(capsys, aster)
    finally:
        server.stop(0).wait()


@pytest.mark.slow
@pytest.mark.attack
def test_the_newest_release_is_never_an_older_one(serving: DeployedStudy, aster: SiteHome) -> None:
    issue(serving)
    shutil.rmtree(serving.home.path / "releases" / issue(serving).name)
    issue(serving)
    pull(aster, "", None)
    shutil.rmtree(serving.home.path / "releases" / "demo-2")
    with pytest.raises(ReleaseError, match="--release demo-1"):
        pull(aster, "", None)
    pull(aster, "demo-1", None)


# What was altered


@pytest.mark.parametrize("name", [ADAPTER, CARD])
@pytest.mark.attack
def test_an_altered_file_is_refused_and_the_next_pull_starts_afresh(
    serving: DeployedStudy, aster: SiteHome, name: str
) -> None:
    path = issue(serving) / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ReleaseError, match=f"'{name}'.*pull again"):
        pull(aster, "", None)
    assert not (aster.path / "releases" / "demo-1").exists()
    path.write_bytes(whole)
    pull(aster, "", None)
    assert (aster.path / "releases" / "demo-1" / name).read_bytes() == whole


@pytest.mark.attack
def test_an_altered_manifest_is_refused(serving: DeployedStudy, aster: SiteHome) -> None:
    issue(serving)
    serving.rewrite("demo-1", privacy={"differential_privacy": True, "epsilon": 0.1})
    with pytest.raises(SignatureError, match="altered"):
        pull(aster, "", None)
    assert not list((aster.path / "releases").glob("demo-1*"))


@pytest.mark.attack
def test_another_key_s_signature_is_refused(serving: DeployedStudy, aster: SiteHome) -> None:
    sign_release(issue(serving), new_signing_key())
    with pytest.raises(SignatureError, match="signed by another key"):
        pull(aster, "", None)


@pytest.mark.attack
def test_another_study_s_release_is_refused_though_the_key_is_right(serving: DeployedStudy, aster: SiteHome) -> None:
    folder = issue(serving)
    manifest = read_release(folder).manifest
    manifest["study"]["name"] = "other"
    write_manifest(folder, manifest)
    sign_release(folder, serving.study_key)
    folder.rename(folder.with_name("other-1"))
    with pytest.raises(ReleaseError, match=r"'other'.*'demo'"):
        pull(aster, "", None)


@pytest.mark.attack
def test_a_sealed_adapter_that_was_altered_is_refused(serving: DeployedStudy, aster: SiteHome) -> None:
    folder = issue(serving, "aster")
    whole = (folder / SEALED).read_bytes()
    (folder / SEALED).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ReleaseError, match=r"pytorch_lora_weights\.safetensors\.sealed.*pull again"):
        pull(aster, "", None)
    envelope = json.loads((folder / ENVELOPE).read_text())
    envelope["sha256"][SEALED] = hashlib.sha256((folder / SEALED).read_bytes()).hexdigest()
    (folder / ENVELOPE).write_text(json.dumps(envelope))
    with pytest.raises(ReleaseError, match="was altered"):  # whoever alters both still lacks the key
        pull(aster, "", None)
    assert not list((aster.path / "releases").glob("demo-1*"))


# Who is let in


@pytest.mark.attack
def test_without_a_certificate_nobody_is_answered(serving: DeployedStudy, aster: SiteHome) -> None:
    assert offered(serving.channel_of(aster)) == Struct.FromString(listing([]).SerializeToString())
    code, said = refusal(lambda: offered(serving.channel()))
    assert code == grpc.StatusCode.UNAVAILABLE
    assert "Traceback" not in said


@pytest.mark.attack
def test_a_foreign_authority_s_certificate_is_refused(serving: DeployedStudy, aster: SiteHome) -> None:
    authority_key, authority = make_authority("demo")
    key = aster.key("certificate")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    foreign = pem(certify_site(authority_key, authority, key.public_key(), "aster"))
    assert refusal(lambda: offered(serving.channel(key, foreign)))[0] == grpc.StatusCode.UNAVAILABLE
    aster.certificate.write_bytes(foreign)
    with pytest.raises(DeploymentError, match=r"site\.crt"):
        pull(aster, "", None)


@pytest.mark.attack
def test_a_server_of_a_foreign_authority_is_refused(
    study: DeployedStudy, aster: SiteHome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    impostor = DeployedStudy(tmp_path / "impostor", "demo", BRAIN_MRI)
    server = start_release_service(impostor.home, study.address)
    try:
        assert "is not this study's server" in pulled_line(capsys, aster)
    finally:
        server.stop(0).wait()


@pytest.mark.attack
def test_an_expired_certificate_is_refused_by_both_sides(serving: DeployedStudy, aster: SiteHome) -> None:
    key = aster.key("certificate")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    expired = serving.certificate("aster", key, days=-1)
    assert refusal(lambda: offered(serving.channel(key, expired)))[0] == grpc.StatusCode.UNAVAILABLE
    aster.certificate.write_bytes(expired)
    with pytest.raises(DeploymentError, match="not now"):
        pull(aster, "", None)


@pytest.mark.slow
@pytest.mark.attack
def test_a_certificate_that_expires_while_connected_is_refused(serving: DeployedStudy, aster: SiteHome) -> None:
    key = aster.key("certificate")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    channel = serving.channel(key, serving.certificate("aster", key, days=3 / 86_400))
    offered(channel)
    deadline = time.monotonic() + WAIT
    with pytest.raises(grpc.RpcError) as caught:
        while time.monotonic() < deadline:
            offered(channel)
            time.sleep(0.2)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert "not valid now" in caught.value.details()


@pytest.mark.attack
def test_a_certificate_of_another_site_s_name_is_refused(serving: DeployedStudy, aster: SiteHome) -> None:
    key = new_elliptic_key()
    code, said = refusal(lambda: offered(serving.channel(key, serving.certificate("aster", key))))
    assert (code, said) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "the certificate is not of the key that 'aster' enrolled",
    )
    code, said = refusal(lambda: offered(serving.channel(key, serving.certificate("zinnia", key))))
    assert (code, said) == (grpc.StatusCode.PERMISSION_DENIED, "'zinnia' is not a site of this study")
    aster.certificate.write_bytes(serving.certificate("aster", key))
    with pytest.raises(DeploymentError, match=r"certificate\.key"):
        pull(aster, "", None)
    own = aster.key("certificate")
    assert isinstance(own, ec.EllipticCurvePrivateKey)
    aster.certificate.write_bytes(serving.certificate("birch", own))
    with pytest.raises(DeploymentError, match=r"'birch'.*'aster'"):
        pull(aster, "", None)


@pytest.mark.attack
def test_a_revocation_holds_on_a_connection_that_is_open(
    serving: DeployedStudy, aster: SiteHome, capsys: pytest.CaptureFixture[str]
) -> None:
    issue(serving)
    channel = serving.channel_of(aster)
    offered(channel)
    serving.revoke("aster")
    for call in (
        lambda: offered(channel),
        lambda: fetch(channel, "demo-1", ADAPTER),
        lambda: health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=WAIT),
    ):
        code, said = refusal(call)
        assert (code, "was revoked" in said) == (grpc.StatusCode.PERMISSION_DENIED, True)
    assert "site 'aster' was revoked" in pulled_line(capsys, aster)


@pytest.mark.attack
def test_a_revocation_ends_a_file_that_is_being_sent(serving: DeployedStudy, aster: SiteHome) -> None:
    size = 256 * 1024 * 1024
    with (issue(serving) / ADAPTER).open("r+b") as stream:
        stream.truncate(size)
    call = serving.channel_of(aster).unary_stream(method(FETCH), Struct.SerializeToString, BytesValue.FromString)
    parts = call(file_request(FileRequest("demo-1", ADAPTER, 0)), timeout=60)
    came = len(next(parts).value)
    serving.revoke("aster")
    with pytest.raises(grpc.RpcError) as caught:
        for part in parts:
            came += len(part.value)
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert came < size


# What may be asked


def test_a_file_is_sent_from_any_byte_on(serving: DeployedStudy, aster: SiteHome) -> None:
    whole = (issue(serving) / ADAPTER).read_bytes()
    channel = serving.channel_of(aster)
    for offset in (0, 1, CHUNK_BYTES, len(whole) - 1, len(whole)):
        assert fetch(channel, "demo-1", ADAPTER, offset) == whole[offset:]
    code, said = refusal(lambda: fetch(channel, "demo-1", ADAPTER, len(whole) + 1))
    assert (code, str(len(whole)) in said) == (grpc.StatusCode.OUT_OF_RANGE, True)
    for offset in (-1, 0.5, float("nan"), float("inf"), 2.0**60, "0", None):
        code, _ = refusal(lambda wrong=offset: fetch(channel, "demo-1", ADAPTER, wrong))  # type: ignore[misc]
        assert code == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("release", "file"),
    [
        ("../run/release", ADAPTER),
        ("demo-1/../../keys", "study.key"),
        ("demo-1", "../../keys/study.key"),
        ("demo-1", "/etc/passwd"),
        ("/etc", "passwd"),
        ("..", "sites.json"),
        (".", MANIFEST),
        ("", MANIFEST),
        (".demo-2.part", MANIFEST),
        ("demo-1", ""),
        ("demo-1", "secret.txt"),
        ("demo-1", SEALED),
        ("demo-1\0", MANIFEST),
        ("DEMO-1", MANIFEST),
    ],
)
@pytest.mark.attack
def test_no_name_leads_out_of_the_releases(serving: DeployedStudy, aster: SiteHome, release: str, file: str) -> None:
    folder = issue(serving)
    (folder / "secret.txt").write_text("secret")
    shutil.copytree(folder, folder.with_name(".demo-2.part"))
    channel = serving.channel_of(aster)
    assert refusal(lambda: fetch(channel, release, file))[0] == grpc.StatusCode.NOT_FOUND
    call = channel.unary_unary(method(MANIFEST_OF), StringValue.SerializeToString, BytesValue.FromString)
    if release != "demo-1":
        assert refusal(lambda: call(StringValue(value=release), timeout=WAIT))[0] == grpc.StatusCode.NOT_FOUND
    assert call(StringValue(value="demo-1"), timeout=WAIT).value == (folder / MANIFEST).read_bytes()


@pytest.mark.attack
def test_malformed_oversized_and_unknown_requests_are_refused_without_a_trace(
    serving: DeployedStudy, aster: SiteHome, caplog: pytest.LogCaptureFixture
) -> None:
    channel = serving.channel_of(aster)
    raw = channel.unary_unary(method(MANIFEST_OF))
    assert refusal(lambda: raw(StringValue(value="x" * 100_000).SerializeToString(), timeout=WAIT))[0] == (
        grpc.StatusCode.RESOURCE_EXHAUSTED
    )
    assert refusal(lambda: raw(b"\xff\xff\xff", timeout=WAIT))[0] == grpc.StatusCode.INTERNAL
    unknown = channel.unary_unary(f"/{SERVICE}/Delete")
    assert refusal(lambda: unknown(b"", timeout=WAIT))[0] == grpc.StatusCode.UNIMPLEMENTED
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.attack
def test_a_failure_at_the_server_tells_the_site_nothing_of_it(
    serving: DeployedStudy, aster: SiteHome, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    channel = serving.channel_of(aster)
    serving.home.registry.write_text("{")
    with caplog.at_level(logging.ERROR):
        code, said = refusal(lambda: offered(channel))
    assert (code, str(serving.folder) in said, "Error" in said) == (grpc.StatusCode.INTERNAL, False, False)
    assert "cannot read the list of sites" in caplog.text
    assert not [record for record in caplog.records if record.exc_info]
    assert "tell the study" in pulled_line(capsys, aster)


@pytest.mark.attack
def test_a_site_has_a_few_calls_at_a_time_and_gets_them_back(serving: DeployedStudy, aster: SiteHome) -> None:
    with (issue(serving) / ADAPTER).open("r+b") as stream:
        stream.truncate(256 * 1024 * 1024)
    channel = serving.channel_of(aster)
    call = channel.unary_stream(method(FETCH), Struct.SerializeToString, BytesValue.FromString)
    asked = file_request(FileRequest("demo-1", ADAPTER, 0))
    streams = [call(asked, timeout=60) for _ in range(CALLS_OF_A_SITE)]
    assert all(next(stream).value for stream in streams)
    code, said = refusal(lambda: offered(channel))
    assert (code, "too many calls" in said) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    birch = serving.admit("birch")
    assert len(offered(serving.channel_of(birch)).fields["releases"].list_value.values) == 1
    for stream in streams:
        stream.cancel()
    deadline = time.monotonic() + WAIT
    while True:
        try:
            offered(channel)
            break
        except grpc.RpcError:
            assert time.monotonic() < deadline, "cancelled calls still count"
            time.sleep(0.1)


def test_the_standard_health_service_answers_admitted_sites(serving: DeployedStudy, aster: SiteHome) -> None:
    health = health_pb2_grpc.HealthStub(serving.channel_of(aster))
    for name in ("", SERVICE):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=WAIT)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    code, _ = refusal(lambda: health.Check(health_pb2.HealthCheckRequest(service="other"), timeout=WAIT))
    assert code == grpc.StatusCode.NOT_FOUND


def test_a_port_that_is_taken_and_a_home_without_keys_are_clear_errors(study: DeployedStudy, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(DeploymentError, match="cannot listen"):
            start_release_service(study.home, f"127.0.0.1:{taken.getsockname()[1]}")
    (study.home.keys / "server.key").chmod(0o644)
    with pytest.raises(SignatureError, match="others may read"):
        start_release_service(study.home, study.address)
    with pytest.raises(DeploymentError, match="ld-server provision"):
        start_release_service(StudyHome(tmp_path / "nowhere"), study.address)


# Broken connections and hostile servers


class Proxy:
    """Forwards one address to another, and cuts the line after so many bytes from the far side.

    It cuts only once some of it has arrived: gRPC throws away what its reader has not asked for yet when a line breaks.
    """

    def __init__(self, listen: str, target: str, cut_after: int | None, arrived: Callable[[], bool]) -> None:
        self.forwarded, self.cut_after, self._target, self._arrived = 0, cut_after, target, arrived
        self._listener = socket.create_server(("127.0.0.1", int(listen.rsplit(":", 1)[1])))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", int(self._target.rsplit(":", 1)[1])))
            for source, sink, counted in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._forward, args=(source, sink, counted), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16_384):
                if counted:
                    self.forwarded += len(data)
                    if self.cut_after is not None and self.forwarded > self.cut_after:
                        self._wait()
                        break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _wait(self) -> None:
        deadline = time.monotonic() + WAIT
        while not self._arrived() and time.monotonic() < deadline:
            time.sleep(0.01)

    def close(self) -> None:
        self._listener.close()


@pytest.mark.slow
@pytest.mark.parametrize("sealed", [False, True])
def test_a_download_that_breaks_off_goes_on_where_it_was(study: DeployedStudy, aster: SiteHome, sealed: bool) -> None:
    folder = issue(study, *(["aster"] if sealed else []))
    size = (folder / (SEALED if sealed else ADAPTER)).stat().st_size
    behind = f"localhost:{free_port()}"
    server = start_release_service(study.home, behind)
    partial = aster.path / "releases" / "demo-1.part" / (SEALED if sealed else ADAPTER)

    def some_arrived() -> bool:
        return partial.exists() and partial.stat().st_size >= CHUNK_BYTES

    proxy = Proxy(study.address, behind, 2 * size // 3, some_arrived)
    try:
        with pytest.raises(DeploymentError, match="no connection to"):
            pull(aster, "", None)
        had = partial.stat().st_size
        assert CHUNK_BYTES <= had < size
        assert not (aster.path / "releases" / "demo-1").exists()
        proxy.cut_after, proxy.forwarded = None, 0
        pull(aster, "", None)
        others = sum(path.stat().st_size for path in folder.iterdir()) - size
        assert proxy.forwarded < size - had + others + 100_000  # what was there already did not travel again
        pulled = aster.path / "releases" / "demo-1" / ADAPTER
        assert pulled.read_bytes() == (study.home.run / "release" / ADAPTER).read_bytes()
    finally:
        proxy.close()
        server.stop(0).wait()


@pytest.mark.attack
def test_what_another_release_left_half_is_not_gone_on_with(serving: DeployedStudy, aster: SiteHome) -> None:
    folder, partial = issue(serving), aster.path / "releases" / "demo-1.part"
    partial.mkdir(parents=True)
    (partial / MANIFEST).write_text("{}")
    (partial / ADAPTER).write_bytes(b"another release's beginning")
    pull(aster, "", None)
    assert (aster.path / "releases" / "demo-1" / ADAPTER).read_bytes() == (folder / ADAPTER).read_bytes()


class Hostile:
    """A server with the study's own certificate that answers whatever it likes."""

    def __init__(self, study: DeployedStudy, folder: Path) -> None:
        self.folder = folder
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        self.list: bytes = listing([Listed(folder.name, 1, sizes)]).SerializeToString()
        self.manifest = BytesValue(value=(folder / MANIFEST).read_bytes()).SerializeToString()
        self.parts: Callable[[str], Iterator[bytes]] = self.honest
        handlers = {
            LIST: grpc.unary_unary_rpc_method_handler(lambda request, context: self.list),
            MANIFEST_OF: grpc.unary_unary_rpc_method_handler(lambda request, context: self.manifest),
            FETCH: grpc.unary_stream_rpc_method_handler(self._fetch),
        }
        self.server = grpc.server(
            ThreadPoolExecutor(4), handlers=[grpc.method_handlers_generic_handler(SERVICE, handlers)]
        )
        key = (study.home.keys / "server.key").read_bytes()
        chain = study.home.certificate("server").read_bytes()
        self.server.add_secure_port(study.address, grpc.ssl_server_credentials([(key, chain)]))
        self.server.start()

    def honest(self, file: str) -> Iterator[bytes]:
        yield (self.folder / file).read_bytes()

    def _fetch(self, request: bytes, context: Any) -> Iterator[bytes]:
        fields = Struct.FromString(request).fields
        for part in self.parts(fields["file"].string_value):
            yield BytesValue(value=part).SerializeToString()


@pytest.fixture
def hostile(study: DeployedStudy) -> Iterator[Hostile]:
    made = Hostile(study, issue(study))
    yield made
    made.server.stop(0).wait()


@pytest.mark.attack
def test_a_stream_that_ends_early_is_cut_short_not_done(
    hostile: Hostile, aster: SiteHome, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (hostile.folder / ADAPTER).read_bytes()
    hostile.parts = lambda file: iter([whole[:1000]]) if file == ADAPTER else hostile.honest(file)
    assert f"1,000 of {len(whole):,} bytes" in pulled_line(capsys, aster)
    hostile.parts = lambda file: iter([whole[1000:]]) if file == ADAPTER else hostile.honest(file)
    pull(aster, "", None)
    assert (aster.path / "releases" / "demo-1" / ADAPTER).read_bytes() == whole


@pytest.mark.attack
def test_a_stream_that_does_not_end_fills_no_disk(hostile: Hostile, aster: SiteHome) -> None:
    def endless(file: str) -> Iterator[bytes]:
        while True:
            yield bytes(CHUNK_BYTES)

    hostile.parts = lambda file: endless(file) if file == ADAPTER else hostile.honest(file)
    with pytest.raises(ReleaseError, match="sent more of"):
        pull(aster, "", None)
    hostile.parts = endless
    with pytest.raises(ReleaseError, match="too large"):
        pull(aster, "", None)
    sizes = {path.name: 2**50 for path in hostile.folder.iterdir()}
    hostile.list = listing([Listed("demo-1", 1, sizes)]).SerializeToString()
    hostile.parts = hostile.honest
    with pytest.raises(LdError, match="free some space"):
        pull(aster, "", None)


@pytest.mark.attack
def test_an_oversized_message_is_one_clear_line(
    hostile: Hostile, aster: SiteHome, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile.manifest = BytesValue(value=bytes(MAX_MESSAGE_BYTES + 1)).SerializeToString()
    assert "a message is too large" in pulled_line(capsys, aster)


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff\xff",
        Struct().SerializeToString(),
        listing([Listed("../../etc", 1, {})]).SerializeToString(),
        listing([Listed("/etc", 1, {})]).SerializeToString(),
        listing([Listed(".ssh", 1, {})]).SerializeToString(),
        listing([Listed("demo-1\x1b[2J", 1, {})]).SerializeToString(),
        listing([Listed("demo-1", -1, {})]).SerializeToString(),
        listing([Listed("demo-1", 1, {"adapter.safetensors": -5})]).SerializeToString(),
    ],
    ids=["bytes", "empty", "parents", "root", "hidden", "escape", "number", "size"],  # protobuf's own order varies
)
@pytest.mark.attack
def test_an_answer_that_is_none_is_one_clear_line(
    hostile: Hostile, aster: SiteHome, capsys: pytest.CaptureFixture[str], answer: bytes
) -> None:
    hostile.list = answer
    said = pulled_line(capsys, aster)
    assert "release service" in said or "failed" in said
    assert "\x1b" not in said


@pytest.mark.attack
def test_an_older_release_under_a_newer_name_is_refused(hostile: Hostile, aster: SiteHome) -> None:
    sizes = {path.name: path.stat().st_size for path in hostile.folder.iterdir()}
    hostile.list = listing([Listed("demo-7", 7, sizes)]).SerializeToString()
    with pytest.raises(ReleaseError, match="another release as 'demo-7'"):
        pull(aster, "", None)


@pytest.mark.attack
def test_a_server_that_refuses_in_its_own_words_cannot_write_on_the_terminal(
    hostile: Hostile, aster: SiteHome, capsys: pytest.CaptureFixture[str]
) -> None:
    def abort(file: str) -> Iterator[bytes]:
        raise RuntimeError("\x1b[2J\n" + "x" * 5000)
        yield b""

    hostile.parts = abort
    said = pulled_line(capsys, aster)
    assert "\x1b" not in said
    assert len(said) < 500
