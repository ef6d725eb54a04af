"""Attempts against what sites connect to, without any key: the built-in proxy, and nginx as `ld-server nginx` sets it.

Each is over when a site at another address still gets through, and Flower was asked nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ld_client.deployment.check_result import CheckStatus
from ld_client.deployment.check_server import check_server
from ld_client.deployment.site_certificate import fetch_certificate
from ld_common.core.errors import DeploymentError
from ld_common.core.processes import free_port
from ld_common.protocol.enrollment_kit import AUTHORITY
from ld_server.cli import app
from ld_server.deployment import connection_limits
from ld_server.deployment.nginx import REQUESTS_PER_SITE, nginx_config
from ld_server.deployment.provision import revoke
from ld_server.deployment.study_home import StudyHome, now
from ld_simulations.benchmarks.deployment.rounds import run_to_release
from tests.support.study_front import NGINX, Front, built_in, make_home, nginx, running_nginx, write_server
from tests.support.two_hospitals import SITES, two_hospitals

ATTACKER = "127.0.0.2"
CALL = "/v1/fleet/pull-messages"
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
FRONTS = ["built-in", pytest.param("nginx", marks=needs_nginx)]


@pytest.fixture(scope="module", params=FRONTS)
def front(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A front whose timeouts are a second instead of ten."""
    home = make_home(tmp_path_factory.mktemp("home") / "home")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        for name in ("HANDSHAKE_SECONDS", "HEAD_SECONDS", "WINDOW_SECONDS"):
            patch.setattr(connection_limits, name, 1.0)
        limits = {"client_header_timeout": "1s", "client_body_timeout": "1s", "keepalive_timeout": "1s"}
        yield stack.enter_context(built_in(home) if request.param == "built-in" else nginx(home, **limits))


@pytest.fixture(autouse=True)
def a_site_gets_through(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each attempt, a site's request is answered as ever."""
    if "front" not in request.fixturenames:
        yield
        return
    front: Front = request.getfixturevalue("front")
    front.asked.clear()
    yield
    site_gets_through(front)


def site_gets_through(front: Front) -> None:
    with front.client() as site:
        assert site.post(CALL, content=b"of a site").status_code == 207
    assert front.asked.pop() == (CALL, b"of a site")


def head(target: str = CALL, *headers: str, method: str = "POST", version: str = "HTTP/1.1") -> bytes:
    return "\r\n".join([f"{method} {target} {version}", "Host: localhost", *headers, "", ""]).encode("latin-1")


def exchange(connection: socket.socket, sent: bytes) -> bytes:
    """What comes back until the front hangs up."""
    with connection, contextlib.suppress(ConnectionError, ssl.SSLError):
        connection.sendall(sent)
        return received(connection)
    return b""


def received(connection: socket.socket) -> bytes:
    """What comes until the front hangs up, b"" where it resets the connection; fails after ten seconds."""
    content = b""
    with contextlib.suppress(ConnectionError, ssl.SSLEOFError):
        while chunk := connection.recv(65536):
            content += chunk
    return content


def refused(answer: bytes) -> bool:
    """Whether a response is an error, in HTTP/0.9 perhaps, or none."""
    return re.match(rb"HTTP/\S+ [123]", answer) is None


LAST = ("Content-Length: 0", "Connection: close")
TARGETS = [
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/",
    "/docs",
    "/openapi.json",
    "/health",
    "/v1/fleet/",
    "/v1/fleet",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol%2fstart-run",
    "/v1/fleet/%2e%2e%2fcontrol%2fstart-run",
    "/v1/fleet/.%252e/control/start-run",
    "/v1/fleet//control",
    "/v1/fleet/x/../../control/start-run",
    "/v1/fleet/./pull-messages",
    "/v1/control/../fleet/pull-messages",
    "/v1/control/..%2ffleet/pull-messages",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages/../../control/start-run",
    "/v1/fleet/pull-messages%00",
    "/v1/fleet/pull-messages%0d%0aX:1",
    "/v1/fleet/pull%2dmessages",
    "/v1/fleet/pull-messages;x=/../../control",
    "/v1/fleet/pull-messages?x=1/../../control",
    "/v1/fleet\\..\\control\\start-run",
    "//v1/control/start-run",
    "//v1/fleet/pull-messages",
    "/V1/Fleet/pull-messages",
    "/v1/FLEET/pull-messages",
    "/v1/fleet/pull-messages#/../control",
    "*",
    "v1/control/start-run",
    "https://localhost/v1/control/start-run",
    "http://127.0.0.1:9091/v1/control/list-runs",
    "https://localhost@127.0.0.1:9091/v1/control/list-runs",
    "file:///v1/control/list-runs",
]


@pytest.mark.attack
@pytest.mark.parametrize("target", TARGETS)
def test_no_other_target_reaches_flower(front: Front, target: str) -> None:
    answer = exchange(front.tls(ATTACKER), head(target, *LAST))
    assert refused(answer)
    assert front.asked == []


@pytest.mark.attack
@pytest.mark.parametrize(
    "method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "post", "PRI"]
)
def test_no_other_method_reaches_flower(front: Front, method: str) -> None:
    answer = exchange(front.tls(ATTACKER), head(CALL, *LAST, method=method))
    assert refused(answer)
    assert front.asked == []


HIDDEN = b"POST /v1/control/start-run HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
MALFORMED = {
    "two lengths": head(CALL, "Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n" + HIDDEN,
    "two lengths, turned": head(CALL, "Transfer-Encoding: chunked", "Content-Length: 5") + b"0\r\n\r\n" + HIDDEN,
    "unknown length": head(CALL, "Connection: close", "Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n",
    "unknown encoding": head(CALL, "Content-Length: 5", "Transfer-Encoding: xchunked") + b"hello",
    "encoded twice": head(CALL, "Transfer-Encoding: chunked", "Transfer-Encoding: identity") + b"0\r\n\r\n" + HIDDEN,
    "two numbers": head(CALL, "Content-Length: 5", "Content-Length: 6") + b"hello" + HIDDEN,
    "list of numbers": head(CALL, "Content-Length: 5, 5") + b"hello",
    "negative length": head(CALL, "Content-Length: -1") + b"hello",
    "signed length": head(CALL, "Content-Length: +5") + b"hello",
    "no length": head(CALL, "Connection: close"),
    "length of 129 MiB": head(CALL, f"Content-Length: {129 << 20}") + b"hello",
    "length of 30 digits": head(CALL, f"Content-Length: {10**30}") + b"hello",
    "space before the colon": head(CALL, "Content-Length : 5") + b"hello",
    "zero byte": head(CALL, "X: a\0b", *LAST),
    "huge header": head(CALL, f"X: {'x' * 100_000}", *LAST),
    "huge name": head(CALL, f"{'x' * 100_000}: 1", *LAST),
    "many headers": head(CALL, *(f"X-{number}: {number}" for number in range(5000)), *LAST),
    "endless header": b"POST " + CALL.encode() + b" HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 2_000_000,
    "endless target": b"POST /v1/fleet/" + b"x" * 2_000_000,
    "long target": head(f"/v1/fleet/{'x' * 30_000}", *LAST),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 64,
    "HTTP/0.9": f"POST {CALL}\r\n\r\n".encode(),
    "another protocol": b"\x16\x03\x01\x02\x00" * 50 + b"\r\n\r\n",
    "WebSocket": head(CALL, "Connection: Upgrade", "Upgrade: websocket", method="GET"),
}


@pytest.mark.slow
@pytest.mark.attack
@pytest.mark.parametrize("sent", [pytest.param(sent, id=name) for name, sent in MALFORMED.items()])
def test_nothing_malformed_reaches_flower(front: Front, sent: bytes) -> None:
    answer = exchange(front.tls(ATTACKER), sent)
    assert refused(answer)
    assert front.asked == []


@pytest.mark.attack
def test_a_request_behind_another_is_judged_by_itself(front: Front) -> None:
    sent = head(CALL, "Content-Length: 5") + b"hello" + head("/v1/control/start-run", *LAST)
    exchange(front.tls(ATTACKER), sent)
    assert front.asked == [(CALL, b"hello")]


@pytest.mark.attack
def test_a_request_without_tls_is_not_served(front: Front) -> None:
    answer = exchange(front.plain(ATTACKER), head(CALL, *LAST))
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert front.asked == []


@pytest.mark.attack
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_an_old_version_of_tls_is_refused(front: Front, version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(cafile=str(front.home.certificate("authority")))
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    with front.plain(ATTACKER) as plain, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(plain, server_hostname="localhost")


Begin = Callable[[Front], socket.socket]


def silent(front: Front) -> socket.socket:
    return front.plain(ATTACKER)


def half_a_handshake(front: Front) -> socket.socket:
    connection = front.plain(ATTACKER)
    connection.sendall(b"\x16\x03\x01\x02\x00\x01")
    return connection


def idle(front: Front) -> socket.socket:
    return front.tls(ATTACKER)


def half_a_head(front: Front) -> socket.socket:
    connection = front.tls(ATTACKER)
    connection.sendall(b"POST /v1/fleet/pull-mess")
    return connection


def half_a_body(front: Front) -> socket.socket:
    connection = front.tls(ATTACKER)
    connection.sendall(head(CALL, "Content-Length: 100") + b"b")
    return connection


def half_a_large_body(front: Front) -> socket.socket:
    connection = front.tls(ATTACKER)
    connection.sendall(head(CALL, "Content-Length: 100000000") + b"b")
    return connection


SLOW = [silent, half_a_handshake, idle, half_a_head, half_a_body, half_a_large_body]


@pytest.mark.slow
@pytest.mark.attack
@pytest.mark.parametrize(
    "begin",
    [
        silent,
        half_a_head,
        half_a_large_body,
        *(pytest.param(begin, marks=pytest.mark.slow) for begin in (half_a_handshake, idle, half_a_body)),
    ],
)
def test_an_address_cannot_take_all_connections(front: Front, begin: Begin) -> None:
    with contextlib.ExitStack() as connections:
        for _ in range(262):
            with contextlib.suppress(OSError):  # one too many
                connections.enter_context(begin(front))
        site_gets_through(front)


@pytest.mark.attack
@pytest.mark.parametrize("count", [8, 64])
def test_an_address_cannot_take_all_places_of_large_requests(front: Front, count: int) -> None:
    with contextlib.ExitStack() as connections:
        for _ in range(count):
            with contextlib.suppress(OSError):
                connections.enter_context(half_a_large_body(front))
        with front.client() as site:
            assert site.post(CALL, content=bytes(10_000_000)).status_code == 207
    assert [len(body) for _, body in front.asked if body] == [10_000_000]


@pytest.fixture(scope="module")
def slow(front: Front) -> Iterator[dict[str, socket.socket]]:
    """A connection of each kind, all begun together."""
    with contextlib.ExitStack() as connections:
        yield {begin.__name__: connections.enter_context(begin(front)) for begin in SLOW}


@pytest.mark.attack
@pytest.mark.parametrize("kind", [begin.__name__ for begin in SLOW])
def test_a_slow_connection_is_ended(front: Front, slow: dict[str, socket.socket], kind: str) -> None:
    answer = received(slow[kind])  # fails after ten seconds
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408")
    assert [body for _, body in front.asked if body] == []


@pytest.mark.slow
@pytest.mark.attack
@pytest.mark.parametrize("begin", [half_a_head, half_a_body, half_a_large_body])
def test_a_dripping_connection_does_not_occupy_flower(front: Front, begin: Begin) -> None:
    """nginx has no lowest rate: it keeps one of the address's connections, which costs Flower nothing."""
    with begin(front) as connection:
        connection.settimeout(0.2)
        for _ in range(12 if front.name == "nginx" else 300):  # a busy machine ends it late
            try:
                connection.sendall(b"x")
                if connection.recv(100):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        else:
            assert front.name == "nginx"
            assert begin is not half_a_head
    assert [body for _, body in front.asked if body] == []


@needs_nginx
def test_a_revoked_site_is_told_so_through_nginx(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    with nginx(home) as front, front.client() as site:
        assert site.get("/certificates/aster").content == home.site_certificate("aster").read_bytes()
        assert site.get("/certificates/birch").status_code == 404
        sites = home.sites()
        home.write_sites({"aster": dataclasses.replace(sites["aster"], revoked=now())})
        assert site.get("/certificates/aster").status_code == 410
        for name in ("authority", "server", "..%2fkeys%2fserver", "../server.yaml", "aster%00", "aster?x"):
            assert site.get(f"/certificates/{name}").status_code in (400, 404)


@needs_nginx
def test_nginx_hides_its_version_and_logs_no_secret(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    with nginx(home) as front, front.client() as site:
        answer = site.post(f"{CALL}?token=PLANTED", headers={"authorization": "PLANTED"})
        assert (answer.status_code, answer.headers["server"]) == (404, "nginx")
        site.post(CALL, content=b"PLANTED", headers={"flwr-signature": "PLANTED"})
        assert front.asked == [(CALL, b"PLANTED")]
    log = (home.path / "nginx/latent-drift.log").read_text()
    assert f"POST {CALL} 207" in log
    assert "PLANTED" not in log + (home.path / "nginx/latent-drift-error.log").read_text()


@needs_nginx
def test_nginx_limits_the_rate_of_an_address_and_says_when_flower_is_not_there(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    with nginx(home, limit_req="zone=rate_of_address burst=2 nodelay") as front, front.client() as site:
        statuses = [site.post(CALL, content=b"x").status_code for _ in range(40)]
        assert set(statuses) == {207, 503}
        write_server(home, dataclasses.replace(home.server(), link_port=free_port()))
    with nginx_alone(home) as front, front.client() as site:
        assert site.post(CALL, content=b"x").status_code == 503
        assert site.get("/health").status_code == 503


@contextlib.contextmanager
def nginx_alone(home: StudyHome) -> Iterator[Front]:
    """nginx with nothing behind it."""
    (home.path / "nginx").rename(home.path / "former")
    with running_nginx(home):
        yield Front("nginx", home, [])


def test_the_command_prints_the_configuration_or_what_is_missing(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    with pytest.raises(DeploymentError, match="proxy_port: 9094"):
        nginx_config(home, 4)
    write_server(home, dataclasses.replace(home.server(), proxy_port=free_port()))
    answer = CliRunner().invoke(app, ["nginx", str(home.path), "--sites-per-address", "7"])
    assert answer.stdout == nginx_config(home, 7) + "\n"
    assert "limit_conn requests_of_address 56;" in answer.stdout
    home.path.rename(tmp_path / "a home; }")
    with pytest.raises(DeploymentError, match="without spaces"):
        nginx_config(StudyHome(tmp_path / "a home; }"), 4)


@needs_nginx
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_study_runs_through_nginx(site_yaml: Path, tmp_path: Path) -> None:
    """Provision, nginx in front, two sites enrol, rounds run to the release, one site is revoked."""
    stage = two_hospitals(site_yaml, tmp_path)
    write_server(stage.home, dataclasses.replace(stage.home.server(), proxy_port=free_port()))
    with running_nginx(stage.home) as log, stage.served():
        kit = stage.sites["birch"].kit()
        checks = check_server(kit.server, stage.sites["birch"].kit_folder / AUTHORITY)
        assert {(check.name, check.status) for check in checks} == {
            (name, CheckStatus.OK) for name in ("server", "server certificate", "clock")
        }
        fetch_certificate(stage.sites["birch"])
        run_to_release(stage)
        revoke(stage.home, "birch")
        with pytest.raises(DeploymentError, match="revoked"):
            fetch_certificate(stage.sites["birch"])
    requests = [line.split() for line in log.read_text().splitlines()]
    assert {status for _, _, method, _, status, *_ in requests if method == "POST"} <= {"200", "401", "403", "503"}
    each_second = Counter(time for _, time, *_ in requests)
    assert max(each_second.values()) <= len(SITES) * REQUESTS_PER_SITE
