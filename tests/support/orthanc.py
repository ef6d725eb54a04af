"""Orthanc, a PACS, with its DICOMweb plug-in on loopback; tests that need it are skipped where it is absent.

Orthanc 1.10 of Debian 12 crashes at its first TLS connection: its HTTP server (civetweb) calls a function that
OpenSSL 3 no longer has. So `tls_front` stands before it, as a reverse proxy does in a hospital.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from ld_common.core.processes import free_port

USER, PASSWORD = "radiology", "only for tests"
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
START_S = 30.0


@dataclass(frozen=True)
class Orthanc:
    """A running server."""

    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """Of its DICOMweb service."""
        return f"http://127.0.0.1:{self.port}/dicom-web"

    def ask(self, path: str, method: str = "GET", data: bytes | None = None) -> Any:
        """An answer of its own interface, not DICOMweb's."""
        with requests.Session() as session:
            session.trust_env, session.auth = False, (USER, PASSWORD)
            answer = session.request(method, f"http://127.0.0.1:{self.port}{path}", data=data, timeout=10)
        answer.raise_for_status()
        return answer.json()

    def add(self, files: Sequence[Path]) -> None:
        """Store DICOM files, without DICOMweb."""
        for file in files:
            self.ask("/instances", "POST", file.read_bytes())

    def clear(self) -> None:
        """Delete all patients."""
        for patient in self.ask("/patients"):
            self.ask(f"/patients/{patient}", "DELETE")


@contextmanager
def running_orthanc(folder: Path) -> Iterator[Orthanc]:
    """A server with one user and an empty archive in `folder`; skips the test where there is none."""
    program = shutil.which("Orthanc")
    if program is None or not PLUGIN.exists():
        pytest.skip("no Orthanc on this machine: install orthanc and orthanc-dicomweb")
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    options = {
        "Name": "test",
        "StorageDirectory": str(folder / "archive"),
        "IndexDirectory": str(folder / "archive"),
        "HttpPort": port,
        "HttpBindAddresses": ["127.0.0.1"],
        "RemoteAccessAllowed": False,
        "DicomServerEnabled": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD},
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(options), encoding="utf-8")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log, cwd=folder)
    server = Orthanc(port, process)
    try:
        _wait_for(server, folder / "log")
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(server: Orthanc, log: Path) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            server.ask("/system")
            return
        except requests.RequestException:
            stopped = server.process.poll() is not None
            if stopped or time.monotonic() > end:
                raise AssertionError(f"Orthanc did not start: {log.read_text()[-2000:]}") from None
            time.sleep(0.05)


@contextmanager
def tls_front(port: int, certificate: tuple[Path, Path], authority: Path) -> Iterator[int]:
    """A TLS server before the server on `port`; yields its own port.

    Args:
        port: of a server on loopback.
        certificate: files of the front's certificate and key.
        authority: file of the authority that must have signed a client's certificate.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority))
    context.load_cert_chain(*map(str, certificate))
    context.verify_mode = ssl.CERT_REQUIRED

    class Front(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with (
                contextlib.suppress(OSError),
                context.wrap_socket(self.request, server_side=True) as client,
                socket.create_connection(("127.0.0.1", port)) as server,
            ):
                threading.Thread(target=_pass_on, args=(server, client), daemon=True).start()
                _pass_on(client, server)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Front) as front:
        front.daemon_threads = True
        thread = threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield int(front.server_address[1])
        finally:
            front.shutdown()
            thread.join()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while received := source.recv(2**16):
            target.sendall(received)
        target.shutdown(socket.SHUT_WR)
