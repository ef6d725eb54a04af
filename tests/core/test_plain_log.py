"""Logs of other programs: whole, once, without escape codes, whoever is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ld_common.core.plain_log import plain_log, without_escapes

COLORED = "\x1b[92mINFO \x1b[0m:      round 1 \x1b]0;title\x07ends\x1b[2K\x1b[1;31m!\x1b[m"
PLAIN = "INFO :      round 1 ends!"


def python(code: str, stream: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=stream, stderr=stream)  # type: ignore[call-overload]


def test_escape_codes_are_taken_out_and_nothing_else() -> None:
    assert without_escapes(COLORED) == PLAIN
    assert without_escapes("├── ε [0m kept, 50 % \t") == "├── ε [0m kept, 50 % \t"


def test_output_of_several_programs_is_appended_each_line_once(tmp_path: Path) -> None:
    log = tmp_path / "link.log"
    log.write_text("before\n")
    with plain_log(log, wait_seconds=20) as stream:
        for name in ("one", "two"):
            code = f"import sys\nfor n in range(50): print({COLORED!r}, '{name}', n, file=sys.stderr, flush=True)"
            python(code, stream).wait()
        python("import sys; sys.stdout.write('no newline at the end')", stream).wait()
    lines = log.read_text().splitlines()
    expected = [f"{PLAIN} {name} {number}" for name in ("one", "two") for number in range(50)]
    assert lines == ["before", *expected, "no newline at the end"]


STARTER = """
import subprocess, sys
from pathlib import Path
from ld_common.core.plain_log import plain_log
with plain_log(Path(sys.argv[1])) as stream:
    code = "import time\\nfor n in range(100): print(n, flush=True); time.sleep(0.1)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=stream, stderr=stream)
print(child.pid, flush=True)
child.wait()
"""


def test_a_program_keeps_its_log_when_the_one_that_started_it_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "link.log"
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(log)], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    child = int(starter.stdout.readline())
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    written = log.read_text() if log.exists() else ""
    deadline = time.monotonic() + 20
    while not (log.exists() and len(log.read_text()) > len(written)) and time.monotonic() < deadline:
        time.sleep(0.05)
    subprocess.run(["kill", "-9", str(child)], check=True)
    assert len(log.read_text()) > len(written)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_log_outlives_the_signal_that_stops_the_programs(tmp_path: Path, stop: signal.Signals) -> None:
    """So that what they say at their end is in it."""
    log = tmp_path / "link.log"
    writer = subprocess.Popen(
        [sys.executable, "-m", "ld_common.core.plain_log", str(log)], stdin=subprocess.PIPE, bufsize=0
    )
    assert writer.stdin is not None
    writer.stdin.write(b"begun\n")
    deadline = time.monotonic() + 20
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    writer.send_signal(stop)
    time.sleep(0.2)
    writer.stdin.write(b"ended\n")
    writer.stdin.close()
    assert writer.wait(20) == 0
    assert log.read_text() == "begun\nended\n"
