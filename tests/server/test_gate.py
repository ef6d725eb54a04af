"""The gate lets Flower's fleet API through and nothing else, whatever the request looks like."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import uvicorn
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from ld_common.core.config import to_mapping
from ld_common.core.processes import free_ports
from ld_common.protocol.keys import new_elliptic_key, write_private_key
from ld_common.protocol.site_keys import new_site_keys, public_keys
from ld_server.deployment.certificates import certify_server, certify_site, make_authority, pem
from ld_server.deployment.fleet_proxy import MAX_CONNECTIONS, MAX_REQUEST_BYTES, SMALL_REQUEST_BYTES, proxy_server
from ld_server.deployment.study_home import AdmittedSite, ServerConfig, StudyHome, now

ASKED: list[tuple[str, bytes]] = []
HEAD = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"


async def record(request: Request) -> Response:
    """What stands in for Flower's SuperLink: everything is allowed there."""
    with contextlib.suppress(ClientDisconnect):
        ASKED.append((request.url.path, await request.body()))
    return Response(b"\x00answer", 207, {"x-flower": request.headers.get("x-flower", "")})


@contextlib.contextmanager
def running(server: uvicorn.Server) -> Iterator[None]:
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.started
    yield
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> StudyHome:
    home = StudyHome(tmp_path_factory.mktemp("home"))
    home.keys.mkdir()
    home.certificates.mkdir()
    authority_key, authority = make_authority("gate")
    key = ec.generate_private_key(ec.SECP384R1())
    write_private_key(home.keys / "server.key", key)
    home.certificate("authority").write_bytes(pem(authority))
    certificate = certify_server(authority_key, authority, key.public_key(), ["localhost", "127.0.0.1"])
    home.certificate("server").write_bytes(pem(certificate))
    config = ServerConfig(["localhost"], "127.0.0.1", *free_ports(3))
    (home.path / "server.yaml").write_text(yaml.safe_dump(to_mapping(config)))
    site = new_elliptic_key()
    home.write_sites({"aster": AdmittedSite("aster", public_keys(new_site_keys()), now())})
    home.site_certificate("aster").parent.mkdir()
    home.site_certificate("aster").write_bytes(pem(certify_site(authority_key, authority, site.public_key(), "aster")))
    return home


@pytest.fixture(scope="module")
def gate(home: StudyHome) -> Iterator[httpx.Client]:
    """A client of the gate, in front of an upstream that would answer anything."""
    upstream = uvicorn.Server(
        uvicorn.Config(
            Starlette(routes=[Route("/{path:path}", record, methods=["GET", "POST", "PUT"])]),
            host="127.0.0.1",
            port=home.server().link_port,
            ssl_certfile=home.certificate("server"),
            ssl_keyfile=home.keys / "server.key",
            log_level="warning",
        )
    )
    context = ssl.create_default_context(cafile=str(home.certificate("authority")))
    url = f"https://localhost:{home.server().gate_port}"
    with running(upstream), running(proxy_server(home)), httpx.Client(base_url=url, verify=context) as client:
        yield client


def test_the_fleet_api_passes_unchanged(gate: httpx.Client) -> None:
    ASKED.clear()
    body = bytes(range(256)) * 5000
    answer = gate.post("/v1/fleet/pull-messages", content=body, headers={"x-flower": "kept"})
    assert (answer.status_code, answer.content, answer.headers["x-flower"]) == (207, b"\x00answer", "kept")
    assert [("/v1/fleet/pull-messages", body)] == ASKED


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/list-runs",
        "/v1/runtime/acquire-task",
        "/",
        "/docs",
        "/openapi.json",
        "/v1/fleet/",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol%2fstart-run",
        "/v1/fleet//control",
        "/v1/fleet/x/../../control/start-run",
        "//v1/control/start-run",
        "/V1/Fleet/pull-messages",
        "/v1/fleet/pull-messages?x=1/../../control",
    ],
)
def test_nothing_else_reaches_flower(gate: httpx.Client, home: StudyHome, path: str) -> None:
    ASKED.clear()
    raw_post(home, path)
    assert {asked for asked, _ in ASKED} <= {"/v1/fleet/pull-messages"}


def raw_post(home: StudyHome, path: str) -> None:
    """POST a path as it stands: clients would tidy it."""
    with raw(home) as tls:
        tls.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
        )
        assert tls.recv(4096).startswith(b"HTTP/1.1 ")


@contextlib.contextmanager
def raw(home: StudyHome) -> Iterator[ssl.SSLSocket]:
    """A connection to the gate that no client library tidies."""
    context = ssl.create_default_context(cafile=str(home.certificate("authority")))
    port = home.server().gate_port
    with (
        socket.create_connection(("localhost", port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        tls.settimeout(20)
        yield tls


def test_reading_a_fleet_path_is_not_posting_it(gate: httpx.Client) -> None:
    ASKED.clear()
    assert gate.get("/v1/fleet/pull-messages").status_code == 405
    assert ASKED == []


def test_a_body_of_unknown_or_excessive_length_is_refused(gate: httpx.Client, home: StudyHome) -> None:
    ASKED.clear()
    assert gate.post("/v1/fleet/pull-messages", content=iter([b"chunk"])).status_code == 413
    with raw(home) as tls:
        tls.sendall(HEAD.replace(b"5", str(MAX_REQUEST_BYTES + 1).encode()) + b"\r\n")
        assert tls.recv(4096).startswith(b"HTTP/1.1 413")
    assert ASKED == []


@pytest.mark.usefixtures("gate")
def test_more_than_the_announced_length_is_not_passed_on(home: StudyHome) -> None:
    ASKED.clear()
    with raw(home) as tls:
        tls.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n20\r\n" + b"x" * 32 + b"\r\n0\r\n\r\n")
        assert tls.recv(4096).startswith(b"HTTP/1.1 400")
    assert ASKED == []


@pytest.mark.usefixtures("gate")
def test_a_body_that_does_not_come_is_not_waited_for(home: StudyHome, monkeypatch: pytest.MonkeyPatch) -> None:
    ASKED.clear()
    monkeypatch.setattr("ld_server.deployment.fleet_proxy.TIMEOUT_SECONDS", 0.5)
    with raw(home) as tls:
        tls.sendall(HEAD + b"\r\nhal")
        answer = b"".join(iter(lambda: tls.recv(4096), b""))  # until the gate hangs up
    assert answer.startswith(b"HTTP/1.1 408")
    assert ASKED == []


def test_whoever_leaves_half_way_leaves_no_trace(
    gate: httpx.Client, home: StudyHome, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    ASKED.clear()
    with raw(home) as tls:
        tls.sendall(HEAD + b"\r\nhal")
        time.sleep(0.2)
    time.sleep(0.5)
    assert gate.get("/health").status_code == 200
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())
    assert [(path, body) for path, body in ASKED if body] == []


def test_large_requests_wait_for_one_another(gate: httpx.Client) -> None:
    ASKED.clear()
    body = bytes(SMALL_REQUEST_BYTES + 1)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: gate.post("/v1/fleet/push-object", content=body), range(12)))
    assert [answer.status_code for answer in answers] == [207] * 12
    assert all(len(received) == len(body) for _, received in ASKED)


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea"])
@pytest.mark.usefixtures("gate")
def test_a_silent_connection_is_closed(home: StudyHome, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr("ld_server.deployment.fleet_proxy.SILENT_SECONDS", 0.3)
    with raw(home) as tls:
        tls.sendall(sent)
        answer = b"".join(iter(lambda: tls.recv(4096), b""))  # until the gate hangs up
    assert answer.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")


def test_a_slow_body_is_no_silence(home: StudyHome, gate: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ld_server.deployment.fleet_proxy.SILENT_SECONDS", 0.1)

    def drops() -> Iterator[bytes]:
        for letter in b"hello":
            time.sleep(0.15)
            yield bytes([letter])

    assert gate.post("/v1/fleet/pull-messages", content=drops(), headers={"content-length": "5"}).status_code == 207


def test_connections_are_limited(home: StudyHome) -> None:
    assert proxy_server(home).config.limit_concurrency == MAX_CONNECTIONS


def test_certificates_are_of_sites_alone(gate: httpx.Client, home: StudyHome) -> None:
    answer = gate.get("/certificates/aster")
    assert x509.load_pem_x509_certificate(answer.content).subject.rfc4514_string() == "CN=aster"
    for name in ("authority", "server", "birch", "..%2fkeys%2fserver", "aster%00"):
        assert gate.get(f"/certificates/{name}").status_code == 404
    sites = home.sites()
    home.write_sites({"aster": dataclasses.replace(sites["aster"], revoked=now())})
    assert gate.get("/certificates/aster").status_code == 410
    home.write_sites(sites)


def test_the_gate_says_when_flower_is_not_there(home: StudyHome, tmp_path: Path) -> None:
    gate_port, link_port = free_ports(2)
    config = dataclasses.replace(home.server(), gate_port=gate_port, link_port=link_port)
    other = StudyHome(tmp_path)
    for name in ("keys", "certificates", "sites.json"):
        (other.path / name).symlink_to(home.path / name)
    (other.path / "server.yaml").write_text(yaml.safe_dump(to_mapping(config)))
    context = ssl.create_default_context(cafile=str(home.certificate("authority")))
    with running(proxy_server(other)), httpx.Client(verify=context) as client:
        url = f"https://localhost:{config.gate_port}"
        assert client.get(f"{url}/health").status_code == 200
        assert client.post(f"{url}/v1/fleet/pull-messages", content=b"x").status_code == 503
