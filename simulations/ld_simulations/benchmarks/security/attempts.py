"""The tests that are an attacker's attempts (`pytest -m attack`): an attempt that is accepted fails."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from ld_common.core.errors import DeploymentError


def run_attempts(project: Path, workers: int) -> dict[str, Any]:
    """Run the marked tests; returns the number of attempts, those accepted, and those that this machine skipped.

    Raises:
        DeploymentError: pytest could not collect or run them.
    """
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "attempts.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "attack", f"--junitxml={report}", "-n", str(workers)]
        ended = subprocess.run(command, cwd=project, capture_output=True, text=True)
        if ended.returncode not in (0, 1) or not report.exists():
            raise DeploymentError(f"the tests could not be run: {' '.join(ended.stdout.split())[-500:]}")
        return count_attempts(report.read_bytes())


def count_attempts(report: bytes) -> dict[str, Any]:
    """Counts of a JUnit report of pytest's."""
    by_module: dict[str, int] = {}
    accepted, skipped = [], []
    for case in ElementTree.fromstring(report).iter("testcase"):
        module, name = case.get("classname", "").removeprefix("tests."), case.get("name", "")
        if case.find("skipped") is not None:
            skipped.append(f"{module}: {name}")
            continue
        by_module[module] = by_module.get(module, 0) + 1
        if case.find("failure") is not None or case.find("error") is not None:
            accepted.append(f"{module}: {name}")
    return {"by_module": dict(sorted(by_module.items())), "accepted": sorted(accepted), "skipped": sorted(skipped)}
