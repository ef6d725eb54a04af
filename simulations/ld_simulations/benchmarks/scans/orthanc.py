"""Orthanc, a PACS, with its DICOMweb plug-in on loopback."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from ld_common.core.errors import DeploymentError
from ld_common.core.processes import free_port

USER, PASSWORD = "radiology", "only on loopback"
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


def orthanc_program() -> str | None:
    """Path of Orthanc where it and its DICOMweb plug-in are installed."""
    return shutil.which("Orthanc") if PLUGIN.exists() else None


@contextmanager
def start_orthanc(folder: Path) -> Iterator[Orthanc]:
    """A server with one user and an empty archive in `folder`.

    Raises:
        DeploymentError: there is none, or it does not start.
    """
    program = orthanc_program()
    if program is None:
        raise DeploymentError("no Orthanc on this machine: install orthanc and orthanc-dicomweb")
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
                raise DeploymentError(f"Orthanc did not start: {log.read_text()[-2000:]}") from None
            time.sleep(0.05)
