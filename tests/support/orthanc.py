"""Orthanc, a PACS, with its DICOMweb plug-in on loopback; tests that need it are skipped where it is absent.

Orthanc 1.10 of Debian 12 crashes at its first TLS connection: its HTTP server (civetweb) calls a function that
OpenSSL 3 no longer has. So `tls_front` stands before it, as a reverse proxy does in a hospital.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ld_simulations.benchmarks.scans.orthanc import PASSWORD, USER, Orthanc, orthanc_program, start_orthanc

__all__ = ["PASSWORD", "USER", "Orthanc", "running_orthanc", "tls_front"]


@contextmanager
def running_orthanc(folder: Path) -> Iterator[Orthanc]:
    """As `start_orthanc`; skips the test where there is none."""
    if orthanc_program() is None:
        pytest.skip("no Orthanc on this machine: install orthanc and orthanc-dicomweb")
    with start_orthanc(folder) as server:
        yield server


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
