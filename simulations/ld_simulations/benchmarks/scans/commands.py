"""Runs a command line of the product in this process, and says which machine it ran on."""

from __future__ import annotations

import contextlib
import io
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ld_common.core.command import run_cli


@dataclass(frozen=True)
class CommandRun:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Its last line on either stream."""
        lines = [line for line in (self.out + self.err).splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""


def run_command(app: typer.Typer, arguments: Sequence[str]) -> CommandRun:
    """Run a command as the shell would, without a process of its own."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_cli(app, list(arguments))
        except SystemExit as ended:
            code = int(ended.code or 0)
    return CommandRun(code, out.getvalue(), err.getvalue())


def this_machine() -> dict[str, Any]:
    """The processor's name and the number of threads that it runs at once."""
    name = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        lines = [line.partition(":")[2].strip() for line in facts.read_text().splitlines() if line[:10] == "model name"]
        name = lines[0] if lines else name
    return {"processor": name, "threads": os.cpu_count() or 1}
