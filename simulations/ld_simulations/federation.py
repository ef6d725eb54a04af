"""A whole federation on this machine through Flower's simulation engine; no process outlives it.

Each run starts a SuperLink on a free loopback port, with its state in the study's output folder, and simulates a node
for each site. Sites train in a Ray of this run, or on the nodes of a Ray cluster that runs already.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import psutil

import ld_simulations
from ld_common.core.errors import FederationError
from ld_common.core.plain_log import plain_log
from ld_common.core.processes import environment, free_port, stop_family, tool
from ld_common.release.release import MANIFEST
from ld_server.deployment.run_log import FLOWER_LOG
from ld_server.round_log import FAILURE, RELEASE, ROUNDS
from ld_simulations.demo import Demo

PROJECT = Path(ld_simulations.__file__).resolve().parents[2]
BUNDLED = ("ld_common", "server", "client", "simulations")
STARTUP_SECONDS = 60.0
POLL_SECONDS = 0.5
CLUSTER_SECONDS = 5.0
LOG_SECONDS = 5.0
SITE_MEGABYTES = 1200
"""A site's process with its libraries and the tiny base."""


def run_federation(
    demo: Demo, resume: bool = False, on_round: Callable[[dict[str, Any]], None] = lambda record: None
) -> Path:
    """Run a demo's study with one simulated node for each site config; returns the release's folder.

    Args:
        demo: its sites are prepared.
        resume: go on after the last checkpoint, where there is one.
        on_round: called with each round's record as it ends, those before a resumed run's first round included.

    Raises:
        FederationError: Flower did not start, no Ray cluster answers, or the study ended without a release.
    """
    if demo.config.ray_address:
        _check_cluster(demo.config.ray_address)
    output = Path(demo.study.output)
    output.mkdir(parents=True, exist_ok=True)
    for stale in (output / ROUNDS, output / FAILURE):
        stale.unlink(missing_ok=True)
    shutil.rmtree(output / RELEASE, ignore_errors=True)
    log = output / FLOWER_LOG
    with (
        plain_log(log, LOG_SECONDS) as stream,
        _superlink(output / "flower", stream, demo.config.ray_address) as (process_environment, connection),
    ):
        project = _copy_project(output / "flower" / "project")
        command = [tool("flwr"), "run", str(project), connection, "--stream"]
        run_config: dict[str, str | bool] = {
            "study": str(demo.study_file.resolve()),
            "sites": str(demo.sites),
            "prepare": "",
            "overrides": shlex.join([*demo.study_overrides, f"output={output}"]),
            "resume": resume,
        }
        command += ["--run-config", " ".join(f"{key}={json.dumps(value)}" for key, value in run_config.items())]
        nodes = len(list(demo.sites.glob("*.yaml")))
        resources = {"num-supernodes": nodes} | _processors(demo, nodes)
        command += ["--federation-config", " ".join(f"{key}={value}" for key, value in resources.items())]
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


def _copy_project(folder: Path) -> Path:
    """The project's files that Flower bundles, alone: it would walk through `.venv` and `runs` too, for ten seconds."""
    for name in BUNDLED:
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, folder / name)
    return folder


def _processors(demo: Demo, sites: int) -> dict[str, int]:
    """Flower's options for how many sites train at once, and with how many processors each."""
    cpus, count = demo.config.cpus_per_site, os.cpu_count() or 1
    if cpus or demo.config.ray_address:
        return {"client-resources-num-cpus": cpus or 1}
    at_once = sites_at_once(sites, count, free_megabytes())
    cpus = max(1, count // at_once)
    return {"client-resources-num-cpus": cpus, "init-args-num-cpus": at_once * cpus}


def sites_at_once(sites: int, processors: int, free_mb: float) -> int:
    """How many of `sites` sites of equal work train at once, so that a round ends early.

    A round takes as long as the last site: with 3 sites on 2 processors, two at a time leave one processor idle for
    half of it, three at a time for none of it.
    """
    if sites <= processors:
        return sites
    at_once = next(count for count in range(processors, sites + 1) if sites % count == 0)
    return at_once if at_once * SITE_MEGABYTES <= free_mb else processors


def free_megabytes() -> float:
    """Memory of this machine that processes can take."""
    return psutil.virtual_memory().available / 2**20


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
def _superlink(home: Path, stream: IO[bytes], ray_address: str) -> Iterator[tuple[dict[str, str], str]]:
    """A SuperLink in simulation mode; yields the environment and the connection's name for `flwr run`.

    Its simulation engine calls `ray.init` without an address: it joins the cluster that `RAY_ADDRESS` names, or starts
    a Ray of its own.
    """
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
    ray = {"RAY_ADDRESS": ray_address} if ray_address else {"RAY_TMPDIR": ray_files}
    process_environment = environment(home) | ray
    if not ray_address:
        process_environment.pop("RAY_ADDRESS", None)
    command = [tool("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--database", str(home / "state.db"), "--disable-runtime-dependency-installation"]
    superlink = subprocess.Popen(command, env=process_environment, stdout=stream, stderr=stream)
    try:
        _wait_until_healthy(superlink, port, home.parent / FLOWER_LOG)
        yield process_environment, connection
    finally:
        stop_family(superlink.pid)
        shutil.rmtree(ray_files, ignore_errors=True)


def _check_cluster(address: str) -> None:
    """Raise `FederationError` unless something accepts connections at a cluster's address."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CLUSTER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise FederationError(
            f"no Ray cluster answers at {address} ({error}): start it with ray start --head, or leave ray_address out"
        ) from error


def _wait_until_healthy(superlink: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline and superlink.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1, trust_env=False).is_success:
                return
        time.sleep(POLL_SECONDS)
    raise FederationError(f"Flower's SuperLink did not start within {STARTUP_SECONDS:g} s (log: {log})")
