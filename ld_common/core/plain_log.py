"""Log files of other programs' output, without the escape codes that color a terminal.

    python -m ld_common.core.plain_log FILE < OUTPUT

appends its input to FILE line by line. It is a process of its own, so that a program keeps its log when the one that
started it is killed.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ESCAPE = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
"""Codes of ECMA-48: colors and moves of the cursor, titles of windows, and those of two characters."""
_writers: list[subprocess.Popen[bytes]] = []


def without_escapes(text: str) -> str:
    """Text without terminal escape codes."""
    return ESCAPE.sub("", text)


@contextmanager
def plain_log(path: Path, wait_seconds: float = 0.0) -> Iterator[IO[bytes]]:
    """A stream for the output of child processes, which is appended to a file without escape codes.

    Children that outlive the block keep their log.

    Args:
        path: the log; its folder exists.
        wait_seconds: how long the end of the block waits until all of the output is in the file, which is after the
            last of the children has ended.
    """
    _writers[:] = [former for former in _writers if former.poll() is None]
    command = [sys.executable, "-P", "-m", "ld_common.core.plain_log", str(path)]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    _writers.append(writer)
    if writer.stdin is None:
        raise ValueError("the writer of a log has no input")
    try:
        yield writer.stdin
    finally:
        writer.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            writer.wait(wait_seconds)


def main() -> None:
    """Copy standard input to the log until the last process that writes to it has ended."""
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, signal.SIG_IGN)  # the programs that are asked to stop say so in the log
    with Path(sys.argv[1]).open("ab", buffering=0) as log:
        for line in sys.stdin.buffer:
            with contextlib.suppress(OSError):  # a full disk must not stop who writes here
                log.write(without_escapes(line.decode(errors="replace")).encode())


if __name__ == "__main__":
    main()
