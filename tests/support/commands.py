"""Commands that tests start and stop as a person at a terminal does."""

from __future__ import annotations

import functools
import signal
import subprocess


def start_command(command: list[str]) -> subprocess.Popen[str]:
    """Start a command that Ctrl-C ends, also where the tests themselves run in a shell's background and ignore it."""
    interruptible = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
    )
