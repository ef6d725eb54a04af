"""The gate, Flower's fleet API behind the built-in proxy. `test_nginx.py` has the attempts against it."""

from __future__ import annotations

import contextlib
import dataclasses
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from cryptography import x509

from ld_common.core.errors import ConfigError, DeploymentError
from ld_server.deployment.connection_limits import network
from ld_server.deployment.fleet_proxy import (
    MAX_CONNECTIONS_PER_ADDRESS,
    MAX_LARGE_REQUESTS_PER_ADDRESS,
    MAX_REQUEST_BYTES,
    SMALL_REQUEST_BYTES,
    proxy_server,
)
from ld_server.deployment.study_home import now
from tests.support.study_front import Front, built_in, make_home, running, write_server

CALL = "/v1/fleet/pull-messages"
HEAD = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with built_in(make_home(tmp_path_factory.mktemp("home") / "home")) as front:
        yield front


@pytest.fixture
def asked(front: Front) -> list[tuple[str, bytes]]:
    """What reached the upstream during the test."""
    front.asked.clear()
    return front.asked


@pytest.fixture
def gate(front: Front) -> Iterator[httpx.Client]:
    """A client of the gate."""
    with front.client() as client:
        yield client


def test_the_fleet_api_passes_unchanged(gate: httpx.Client, asked: list[tuple[str, bytes]]) -> None:
    body = bytes(range(256)) * 5000
    answer = gate.post(CALL, content=body, headers={"x-flower": "kept"})
    assert (answer.status_code, answer.content, answer.headers["x-flower"]) == (207, b"\x00answer", "kept")
    assert len(answer.headers.get_list("date")) == 1
    assert asked == [(CALL, body)]


def test_a_refusal_says_why(front: Front, gate: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ld_server.deployment.connection_limits.WINDOW_SECONDS", 0.3)
    assert gate.get(CALL).status_code == 405
    assert gate.post(CALL, content=iter([b"chunk"])).status_code == 413
    for head, status in {
        HEAD.replace(b"5", str(MAX_REQUEST_BYTES + 1).encode()) + b"\r\n": b"413",
        HEAD + b"\r\nhal": b"408",
    }.items():
        with front.tls() as tls:
            tls.sendall(head)
            answer = b"".join(iter(lambda: tls.recv(4096), b""))  # until the gate hangs up
        assert answer.startswith(b"HTTP/1.1 " + status)


def test_whoever_leaves_half_way_leaves_no_trace(
    front: Front,
    gate: httpx.Client,
    asked: list[tuple[str, bytes]],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with front.tls() as tls:
        tls.sendall(HEAD + b"\r\nhal")
        time.sleep(0.2)
    time.sleep(0.5)
    assert gate.get("/health").status_code == 200
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())
    assert [(path, body) for path, body in asked if body] == []


def test_large_requests_wait_for_one_another(gate: httpx.Client, asked: list[tuple[str, bytes]]) -> None:
    body = bytes(SMALL_REQUEST_BYTES + 1)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: gate.post("/v1/fleet/push-object", content=body), range(12)))
    assert [answer.status_code for answer in answers] == [207] * 12
    assert all(len(received) == len(body) for _, received in asked)


@pytest.mark.attack
def test_too_many_large_requests_of_an_address_are_to_come_again(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ld_server.deployment.fleet_proxy.LARGE_WAIT_SECONDS", 0.2)
    large = HEAD.replace(b"5", b"100000000") + b"\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_LARGE_REQUESTS_PER_ADDRESS):
            stack.enter_context(front.tls("127.0.0.2")).sendall(large)
        one_more = stack.enter_context(front.tls("127.0.0.2"))
        one_more.sendall(large)
        assert one_more.recv(4096).startswith(b"HTTP/1.1 503")


def test_a_connection_may_be_used_again_and_a_second_head_has_to_come(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ld_server.deployment.connection_limits.HEAD_SECONDS", 0.3)
    with front.tls() as tls:
        tls.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
        answer = b"".join(iter(lambda: tls.recv(4096), b""))  # until the gate hangs up
    assert answer.count(b"HTTP/1.1 200") == 1


def test_a_slow_body_is_no_silence(gate: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ld_server.deployment.connection_limits.HEAD_SECONDS", 0.1)

    def drops() -> Iterator[bytes]:
        for letter in b"hello":
            time.sleep(0.15)
            yield bytes([letter])

    assert gate.post(CALL, content=drops(), headers={"content-length": "5"}).status_code == 207


@pytest.mark.slow
@pytest.mark.attack
def test_a_client_that_does_not_read_is_disconnected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ld_server.deployment.connection_limits.STALLED_SECONDS", 0.3)
    with built_in(make_home(tmp_path / "home"), answer=bytes(30_000_000)) as front, front.tls() as tls:
        tls.sendall(HEAD + b"\r\nhello")
        time.sleep(1.5)
        received = 0
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while chunk := tls.recv(1 << 20):
                received += len(chunk)
    assert received < 30_000_000


@pytest.mark.attack
def test_connections_above_the_limit_are_reset_and_make_room_when_they_end(front: Front) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS_PER_ADDRESS):
            stack.enter_context(front.plain("127.0.0.3")).sendall(b"\x16")
        with pytest.raises(ConnectionResetError):  # as it is made, or read from
            stack.enter_context(front.plain("127.0.0.3")).recv(1)
    for _ in range(100):
        with contextlib.suppress(OSError), front.tls("127.0.0.3"):
            return
        time.sleep(0.05)
    raise AssertionError("no connection was given back")


@pytest.mark.parametrize(
    ("host", "counted_as"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:0:1:2:3:4:5", "2001:db8:0:1::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
    ],
)
def test_what_counts_as_one_address(host: str, counted_as: str) -> None:
    assert network(host) == counted_as


def test_certificates_are_of_sites_alone(front: Front, gate: httpx.Client) -> None:
    answer = gate.get("/certificates/aster")
    assert x509.load_pem_x509_certificate(answer.content).subject.rfc4514_string() == "CN=aster"
    for name in ("authority", "server", "birch", "..%2fkeys%2fserver", "aster%00"):
        assert gate.get(f"/certificates/{name}").status_code == 404
    sites = front.home.sites()
    front.home.write_sites({"aster": dataclasses.replace(sites["aster"], revoked=now())})
    assert gate.get("/certificates/aster").status_code == 410
    front.home.write_sites(sites)


def test_the_gate_says_when_flower_is_not_there(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    with running(proxy_server(home)), Front("built-in", home, []).client() as client:
        assert client.get("/health").status_code == 200
        assert client.post(CALL, content=b"x").status_code == 503


def test_behind_nginx_the_gate_is_on_loopback_and_a_port_in_use_is_named(front: Front, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    taken = front.home.server().gate_port
    write_server(home, dataclasses.replace(home.server(), bind="0.0.0.0", proxy_port=taken))
    with pytest.raises(DeploymentError, match=f"127.0.0.1:{taken}"):
        proxy_server(home)
    with pytest.raises(ConfigError, match="different"):
        dataclasses.replace(home.server(), proxy_port=home.server().gate_port)
