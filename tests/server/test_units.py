"""The systemd units and the container file take from a process what it does not need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

FILES = Path(__file__).parents[2] / "configs/deployment"
UNITS = ["ld-server", "ld-client"]
HARDENING = {
    "UMask": ["0077"],
    "ProtectSystem": ["strict"],
    "ProtectHome": ["true"],
    "PrivateTmp": ["true"],
    "NoNewPrivileges": ["true"],
    "CapabilityBoundingSet": [""],
    "RestrictAddressFamilies": ["AF_UNIX AF_INET AF_INET6"],
    "SystemCallFilter": ["@system-service", "~@privileged"],
}


def settings(unit: str) -> dict[str, list[str]]:
    """The values of each key of a unit, in their order."""
    found: dict[str, list[str]] = {}
    for line in (FILES / f"{unit}.service").read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not key.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_hardened(unit: str) -> None:
    found = settings(unit)
    assert {key: found.get(key) for key in HARDENING} == HARDENING
    assert found["User"] == ["latent-drift"]
    home = re.split(r"\s", found["ExecStart"][0])[-1]
    assert found["ReadWritePaths"] == [home]


def test_a_hospitals_unit_reaches_the_server_alone() -> None:
    found = settings("ld-client")
    assert found["IPAddressDeny"] == ["any"]
    assert found["IPAddressAllow"] == ["localhost", "192.0.2.10"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_reads_a_unit_and_finds_it_closed(unit: str, tmp_path: Path) -> None:
    path = tmp_path / f"{unit}.service"
    text = (FILES / path.name).read_text()
    path.write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", text))
    surroundings = os.environ | {"SYSTEMD_PAGER": ""}
    checked = subprocess.run(
        ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, env=surroundings, check=False
    )
    assert path.name not in checked.stderr
    report = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", str(path)],
        capture_output=True,
        text=True,
        env=surroundings,
        check=False,
    )
    level = re.search(r"exposure level for \S+: ([\d.]+)", report.stdout)
    if level is None:
        pytest.skip("this systemd-analyze has no offline check")
    assert float(level[1]) < 2


def test_the_container_does_not_run_as_root() -> None:
    lines = (FILES / "Containerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["10001:10001"]
    assert lines.index("USER 10001:10001") > max(n for n, line in enumerate(lines) if line.startswith(("RUN", "COPY")))
