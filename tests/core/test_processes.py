"""Only what our own tools left running is ended, and nobody's proxy stands between processes of one machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from ld_common.core.processes import environment, no_proxy, stop_family, stop_holders

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes that would run for minutes."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*command: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(command))
        end = time.monotonic() + 30
        # Popen returns when the pipe to the child closes, which the kernel does before it lays down the arguments.
        while not psutil.Process(started[-1].pid).cmdline() and time.monotonic() < end:
            time.sleep(0.01)
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def node(tmp_path: Path) -> str:
    """A command that is called as Flower's is."""
    script = tmp_path / "flower-supernode"
    script.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(200)\n")
    script.chmod(0o755)
    return str(script)


def test_of_all_that_hold_a_file_only_the_tool_is_ended(start: Start, node: str, tmp_path: Path) -> None:
    key = tmp_path / "site.key"
    key.touch()
    held = [start(sys.executable, node, "--key", str(key)), start(node, "--key", str(key))]
    others = [
        start("tail", "-f", str(key)),
        start(sys.executable, "-c", "import time; time.sleep(200)", str(key)),
        start(sys.executable, "-c", "import time; time.sleep(200)", "flower-supernode", str(key)),
        start(sys.executable, node, "--key", f"{key}.old"),
        start(sys.executable, node, f"--note=a word with {key} in it"),
    ]
    stop_holders("flower-superlink", str(key))
    assert all(process.poll() is None for process in [*held, *others])
    stop_holders("flower-supernode", str(key))
    assert not any(process.poll() is None for process in held)
    assert all(process.poll() is None for process in others)


def test_processes_of_other_accounts_are_left_alone(
    start: Start, node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = start(sys.executable, node, "key")
    with monkeypatch.context() as patched:
        patched.setattr(os, "getuid", lambda: 4242)
        stop_holders("flower-supernode", "key")
    assert held.poll() is None


@pytest.mark.parametrize("error", [psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess])
def test_what_cannot_be_looked_at_does_not_stop_the_rest(
    start: Start, node: str, monkeypatch: pytest.MonkeyPatch, error: type[psutil.Error]
) -> None:
    held, seen = start(sys.executable, node, "key"), psutil.Process.cmdline

    def cmdline(process: psutil.Process) -> Any:
        if process.pid != held.pid:
            raise error(process.pid)
        return seen(process)

    monkeypatch.setattr(psutil.Process, "cmdline", cmdline)
    stop_holders("flower-supernode", "key")
    assert held.poll() is not None


@pytest.mark.parametrize("error", [psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess])
@pytest.mark.parametrize("refused", ["children", "terminate"])
def test_a_family_that_may_not_be_ended_is_no_crash(
    start: Start, node: str, monkeypatch: pytest.MonkeyPatch, refused: str, error: type[psutil.Error]
) -> None:
    held = start(node)

    def refuse(process: psutil.Process, **options: Any) -> None:
        raise error(process.pid)

    monkeypatch.setattr(psutil.Process, refused, refuse)
    monkeypatch.setattr("ld_common.core.processes.STOP_SECONDS", 0.1)
    stop_family(held.pid)
    if refused == "terminate":
        assert held.poll() is not None  # killed
    stop_family(2**22 + 1)  # no such process


def test_a_proxy_is_not_asked_for_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.hospital:3128")
    monkeypatch.setenv("NO_PROXY", "pacs.hospital, localhost")
    surroundings = environment(tmp_path)
    assert surroundings["HTTPS_PROXY"] == "http://proxy.hospital:3128"
    assert surroundings["NO_PROXY"] == surroundings["no_proxy"] == "pacs.hospital,localhost,127.0.0.1"
    monkeypatch.setenv("no_proxy", "archive.hospital")
    assert environment(tmp_path)["no_proxy"] == "pacs.hospital,localhost,archive.hospital,127.0.0.1"


def test_httpx_reaches_this_machine_under_those_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.hospital:3128")
    for name, value in no_proxy().items():
        monkeypatch.setenv(name, value)
    with httpx.Client() as client:
        for host, direct in (("127.0.0.1:9091", True), ("localhost:9092", True), ("study.example", False)):
            chosen = client._transport_for_url(httpx.URL(f"http://{host}/"))
            assert (chosen is client._transport) is direct
