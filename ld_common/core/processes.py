"""Child processes: commands installed beside this Python, stopped with all their children."""

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
"""The process has ended (or is a zombie), or belongs to another account."""


def tool(name: str) -> str:
    """The path of a command that is installed beside this Python."""
    return str(Path(sys.executable).parent / name)


def environment(flower_home: Path) -> dict[str, str]:
    """Environment of Flower's processes: their own home, no telemetry, no downloads, commands of this Python first.

    A hospital's proxy stays in use, except for this machine itself.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | {"FLWR_HOME": str(flower_home), "PATH": path, **no_proxy(), **DEFAULTS}


def no_proxy() -> dict[str, str]:
    """Variables that exclude this machine from the use of a proxy, in addition to the present exceptions.

    Both variables get all exceptions, as most programs read only the lower-case one where both are set.
    """
    names = ("NO_PROXY", "no_proxy")
    hosts = [host.strip() for name in names for host in os.environ.get(name, "").split(",") if host.strip()]
    return dict.fromkeys(names, ",".join(dict.fromkeys([*hosts, *LOOPBACK])))


def stop_family(pid: int) -> None:
    """Terminate a process and its descendants, and kill those that do not end."""
    with contextlib.suppress(*OUT_OF_REACH):
        _stop(psutil.Process(pid))


def stop_holders(tool_name: str, argument: str) -> None:
    """Stop this account's processes of a tool with this argument, which a killed parent left running.

    Other programs with the argument, such as an editor, keep running.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(*OUT_OF_REACH):
            words = process.cmdline()
            runs = tool_name in [Path(word).name for word in words[:2]]  # `tool ...` or `python tool ...`
            if runs and argument in words and process.uids().real == os.getuid():
                _stop(process)


def free_port() -> int:
    """A free TCP port of loopback."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Several different free ports."""
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
