"""Runs a command line of the product in this process."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

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
