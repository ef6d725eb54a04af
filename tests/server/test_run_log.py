"""`flower.log` of a deployed run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
from flwr.supercore.logger import console_handler, log

from ld_server.deployment.run_log import FLOWER_LOG, logged_to


def test_flowers_lines_and_ours_stand_there_once_with_the_error_that_ended_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # as in the process of a ServerApp: Flower's handler writes to standard output, in color
    for name, value in (("colored", True), ("timestamps", False), ("stream", sys.stdout)):
        monkeypatch.setattr(console_handler, name, value)
    path = tmp_path / "run" / FLOWER_LOG
    with pytest.raises(ValueError, match="the end"), logged_to(path):
        log(logging.INFO, "[ROUND 1/3]")
        print("round 1: waits up to 5 s for q")
        print("\x1b[31mred\x1b[0m", file=sys.stderr)
        raise ValueError("the end")
    print("afterwards")
    text = path.read_text()
    assert "\x1b" not in text
    assert [text.count(part) for part in ("[ROUND 1/3]", "waits up to", "red", "ValueError: the end")] == [1] * 4
    assert "afterwards" not in text
    assert text.startswith("INFO 20")  # with the time
    said = capsys.readouterr()
    assert "[ROUND 1/3]" in said.out  # Flower still gets it
    with logged_to(path):
        print("resumed")
    assert path.read_text() == f"{text}resumed\n"
