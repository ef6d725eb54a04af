"""A whole federation on this machine through Flower's simulation engine; no process outlives it.

Each run starts a SuperLink on a free loopback port, with its state in the study's output folder, and simulates a node
for each site.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

import ld_simulations
from ld_common.core.errors import FederationError
from ld_common.core.processes import environment, free_port, stop_family, tool
from ld_common.release.release import MANIFEST
from ld_server.round_log import FAILURE, RELEASE, ROUNDS
from ld_simulations.demo import Demo

PROJECT = Path(ld_simulations.__file__).resolve().parents[2]
STARTUP_SECONDS = 60.0
POLL_SECONDS = 0.5


def run_federation(
    demo: Demo, resume: bool = False, on_round: Callable[[dict[str, Any]], None] = lambda record: None
) -> Path:
    """Run a demo's study with one simulated node for each site config; returns the release's folder.

    Args:
        demo: its sites are prepared.
        resume: go on after the last checkpoint, where there is one.
        on_round: called with each round's record as it ends, those before a resumed run's first round included.

    Raises:
        FederationError: Flower did not start, or the study ended without a release.
    """
    output = Path(demo.study.output)
    output.mkdir(parents=True, exist_ok=True)
    for stale in (output / ROUNDS, output / FAILURE):
        stale.unlink(missing_ok=True)
    shutil.rmtree(output / RELEASE, ignore_errors=True)
    log = output / "flower.log"
    with _superlink(output / "flower", log) as (process_environment, connection), log.open("ab") as stream:
        command = [tool("flwr"), "run", str(PROJECT), connection, "--stream"]
        run_config: dict[str, str | bool] = {
            "study": str(demo.study_file.resolve()),
            "sites": str(demo.sites),
            "prepare": "",
            "overrides": shlex.join([*demo.study_overrides, f"output={output}"]),
            "resume": resume,
        }
        command += ["--run-config", " ".join(f"{key}={json.dumps(value)}" for key, value in run_config.items())]
        nodes = len(list(demo.sites.glob("*.yaml")))
        cpus = demo.config.cpus_per_site
        command += ["--federation-config", f"num-supernodes={nodes} client-resources-num-cpus={cpus}"]
        run = subprocess.Popen(command, env=process_environment, stdout=stream, stderr=stream, cwd=output)
        try:
            _follow(run, output / ROUNDS, on_round)
        finally:
            if run.returncode is None:
                stop_family(run.pid)
    if not (output / RELEASE / MANIFEST).exists():
        failure = output / FAILURE
        reason = failure.read_text() if failure.exists() else "Flower ended early"
        raise FederationError(f"the federation ended without a release: {reason} (log: {log})")
    return output / RELEASE


def _follow(run: subprocess.Popen[bytes], rounds: Path, on_round: Callable[[dict[str, Any]], None]) -> None:
    shown = 0
    while True:
        ended = run.poll() is not None
        lines = rounds.read_text().split("\n")[:-1] if rounds.exists() else []
        for line in lines[shown:]:
            on_round(json.loads(line))
        shown = len(lines)
        if ended:
            return
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _superlink(home: Path, log: Path) -> Iterator[tuple[dict[str, str], str]]:
    """A SuperLink in simulation mode; yields the environment and the connection's name for `flwr run`."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    port = free_port()
    connection = "simulation"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{connection}"\n\n'
        f'[superlink.{connection}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    # Ray's sockets must have short paths, so its files cannot lie in the study's folder
    ray_files = tempfile.mkdtemp(prefix="ld-")
    process_environment = environment(home) | {"RAY_TMPDIR": ray_files}
    command = [tool("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--database", str(home / "state.db"), "--disable-runtime-dependency-installation"]
    with log.open("wb") as stream:
        superlink = subprocess.Popen(command, env=process_environment, stdout=stream, stderr=stream)
    try:
        _wait_until_healthy(superlink, port, log)
        yield process_environment, connection
    finally:
        stop_family(superlink.pid)
        shutil.rmtree(ray_files, ignore_errors=True)


def _wait_until_healthy(superlink: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline and superlink.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1, trust_env=False).is_success:
                return
        time.sleep(POLL_SECONDS)
    raise FederationError(f"Flower's SuperLink did not start within {STARTUP_SECONDS:g} s (log: {log})")
