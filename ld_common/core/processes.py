"""Processes that we start: found beside this Python, ended with all that they started."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path

import psutil

from ld_common.core.offline import DEFAULTS

STOP_SECONDS = 10.0
LOOPBACK = ("127.0.0.1", "localhost")
OUT_OF_REACH = (psutil.NoSuchProcess, psutil.AccessDenied)
"""Ended (zombies too), or another account's."""


def tool(name: str) -> str:
    """The path of a command that is installed beside this Python."""
    return str(Path(sys.executable).parent / name)


def environment(flower_home: Path) -> dict[str, str]:
    """What Flower's processes run under: a home of their own, no telemetry, no downloads, our own tools first.

    A hospital's proxy is left to them, but not on the way to this machine itself.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | {"FLWR_HOME": str(flower_home), "PATH": path, **no_proxy(), **DEFAULTS}


def no_proxy() -> dict[str, str]:
    """The variables that keep a proxy out of the way to this machine itself, with the exceptions that stand there.

    Both get all of them: where both are set, most programs read the one in small letters alone.
    """
    names = ("NO_PROXY", "no_proxy")
    known = [host.strip() for name in names for host in os.environ.get(name, "").split(",") if host.strip()]
    return dict.fromkeys(names, ",".join(dict.fromkeys([*known, *LOOPBACK])))


def stop_family(pid: int) -> None:
    """End a process and all that it started, gently first; nothing when it has ended."""
    with contextlib.suppress(*OUT_OF_REACH):
        _stop(psutil.Process(pid))


def stop_holders(tool_name: str, argument: str) -> None:
    """End this account's processes of a tool that were started with this argument: what a killed parent left running.

    Whatever else names the argument, such as an editor or a backup of the file, is left alone.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(*OUT_OF_REACH):
            words = process.cmdline()
            runs = tool_name in [Path(word).name for word in words[:2]]  # `tool ...` or `python tool ...`
            if runs and argument in words and process.uids().real == os.getuid():
                _stop(process)


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """As many different ones."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _stop(parent: psutil.Process) -> None:
    family = [*parent.children(recursive=True), parent]
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in family:
            with contextlib.suppress(*OUT_OF_REACH):
                end(process)
        _, family = psutil.wait_procs(family, timeout=STOP_SECONDS)
