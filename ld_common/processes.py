"""Processes that we start: found beside this Python, ended with all that they started."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path

import psutil

from ld_common.offline import DEFAULTS

STOP_SECONDS = 10.0


def tool(name: str) -> str:
    """The path of a command that is installed beside this Python."""
    return str(Path(sys.executable).parent / name)


def environment(flower_home: Path) -> dict[str, str]:
    """What Flower's processes run under: a home of their own, no telemetry, no downloads, our own tools first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | {"FLWR_HOME": str(flower_home), "PATH": path, **DEFAULTS}


def stop_family(pid: int) -> None:
    """End a process and all that it started, gently first; nothing when it has ended."""
    try:
        parent = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    family = [*parent.children(recursive=True), parent]
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        _, family = psutil.wait_procs(family, timeout=STOP_SECONDS)


def stop_holders(argument: str) -> None:
    """End every process that was started with this argument: what a killed parent of ours left running."""
    for process in psutil.process_iter(["cmdline"]):
        if argument in (process.info["cmdline"] or []):
            stop_family(process.pid)


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
