"""What sites connect to, the built-in proxy or nginx before it, in front of an upstream that would answer anything."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import httpx
import uvicorn
import yaml
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
from ld_server.deployment.fleet_proxy import proxy_server
from ld_server.deployment.nginx import nginx_config
from ld_server.deployment.study_home import AdmittedSite, ServerConfig, StudyHome, now

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@dataclass
class Front:
    """A running front."""

    name: str
    home: StudyHome
    asked: list[tuple[str, bytes]]
    """Paths and bodies that reached the upstream."""

    @cached_property
    def context(self) -> ssl.SSLContext:
        """TLS as a site has it."""
        return ssl.create_default_context(cafile=str(self.home.certificate("authority")))

    def client(self) -> httpx.Client:
        """A site at 127.0.0.1."""
        url = f"https://localhost:{self.home.server().gate_port}"
        return httpx.Client(base_url=url, verify=self.context, trust_env=False, timeout=10)

    def plain(self, source: str = "127.0.0.1") -> socket.socket:
        """A TCP connection from an address of loopback."""
        connection = socket.create_connection(("127.0.0.1", self.home.server().gate_port), 10, (source, 0))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def tls(self, source: str = "127.0.0.1") -> ssl.SSLSocket:
        """A TLS connection that no client library tidies."""
        return self.context.wrap_socket(self.plain(source), server_hostname="localhost")


def make_home(path: Path) -> StudyHome:
    """A home with keys, certificates, free ports and the admitted site aster."""
    home = StudyHome(path)
    home.certificates.mkdir(parents=True)
    authority_key, authority = make_authority("gate")
    key = ec.generate_private_key(ec.SECP384R1())
    write_private_key(home.keys / "server.key", key)
    home.certificate("authority").write_bytes(pem(authority))
    certificate = certify_server(authority_key, authority, key.public_key(), ["localhost", "127.0.0.1"])
    home.certificate("server").write_bytes(pem(certificate))
    write_server(home, ServerConfig(["localhost"], "127.0.0.1", *free_ports(3)))
    site = new_elliptic_key()
    home.write_sites({"aster": AdmittedSite("aster", public_keys(new_site_keys()), now())})
    home.site_certificate("aster").parent.mkdir()
    home.site_certificate("aster").write_bytes(pem(certify_site(authority_key, authority, site.public_key(), "aster")))
    return home


def write_server(home: StudyHome, config: ServerConfig) -> None:
    """Replace `server.yaml`."""
    (home.path / "server.yaml").write_text(yaml.safe_dump(to_mapping(config)))


@contextlib.contextmanager
def built_in(home: StudyHome, name: str = "built-in", answer: bytes = b"\x00answer") -> Iterator[Front]:
    """The built-in proxy."""
    asked: list[tuple[str, bytes]] = []
    with running(superlink(home, asked, answer)), running(proxy_server(home)):
        yield Front(name, home, asked)


@contextlib.contextmanager
def nginx(home: StudyHome, **replaced: str) -> Iterator[Front]:
    """nginx with the built-in proxy behind it on loopback; `replaced` directives of it have another value."""
    config = home.server()
    config.proxy_port = free_ports(1)[0]
    write_server(home, config)
    with built_in(home, "nginx") as front, running_nginx(home, **replaced):
        yield front


@contextlib.contextmanager
def running_nginx(home: StudyHome, **replaced: str) -> Iterator[Path]:
    """nginx in front of a home, with its files in `home/nginx`; yields its log of requests."""
    folder = home.path / "nginx"
    folder.mkdir()
    text = nginx_config(home, 4).replace("/var/log/nginx", str(folder))
    temporary = "".join(f"{name}_temp_path {folder / name};\n" for name in TEMPORARY)
    text = text.replace("http {\n", f"http {{\n{temporary}", 1)
    for directive, value in replaced.items():
        lines = [line for line in text.splitlines() if line.split()[:1] == [directive]]
        text = text.replace(lines[-1], f"{directive} {value};")
    (folder / "nginx.conf").write_text(text)
    command = [str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "start.log")]
    # root's temporary folders are closed to the account that nginx's workers have by default
    settings = f"daemon off; user root; pid {folder / 'nginx.pid'};"
    checked = subprocess.run([*command, "-g", settings, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    process = subprocess.Popen([*command, "-g", settings])
    try:
        deadline = time.monotonic() + 20
        while not answers(home.server().gate_port) and time.monotonic() < deadline:
            time.sleep(0.02)
        yield folder / "latent-drift.log"
    finally:
        process.terminate()
        process.wait(20)


def answers(port: int) -> bool:
    """Whether something listens on a port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def superlink(home: StudyHome, asked: list[tuple[str, bytes]], answer: bytes) -> uvicorn.Server:
    """What stands in for Flower's SuperLink: everything is allowed there."""

    async def record(request: Request) -> Response:
        with contextlib.suppress(ClientDisconnect):
            asked.append((request.url.path, await request.body()))
        return Response(answer, 207, {"x-flower": request.headers.get("x-flower", "")})

    return uvicorn.Server(
        uvicorn.Config(
            Starlette(routes=[Route("/{path:path}", record, methods=["GET", "POST", "PUT", "DELETE"])]),
            host="127.0.0.1",
            port=home.server().link_port,
            ssl_certfile=home.certificate("server"),
            ssl_keyfile=home.keys / "server.key",
            log_level="warning",
        )
    )


@contextlib.contextmanager
def running(server: uvicorn.Server) -> Iterator[None]:
    """A server in a thread, until the block ends."""
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.started
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(20)
