"""`ld-client start`: runs the node, which fetches tasks, and the executor, which runs approved code."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ld_client.deployment.approvals import check_approved, check_bundle
from ld_client.deployment.site_certificate import ensure_certificate, fetch_certificate
from ld_client.deployment.site_home import SiteHome
from ld_client.several_processes import process_count
from ld_client.site_config import LAUNCHER, PROCESSES
from ld_common.core.atomic_files import held, write_new
from ld_common.core.errors import DeploymentError
from ld_common.core.plain_log import plain_log
from ld_common.core.processes import environment, free_port, stop_family, stop_holders, tool

POLL_SECONDS, RETRY_SECONDS, FORMER_NODE_SECONDS, LOG_SECONDS = 0.5, 5.0, 120.0, 5.0
TASK_INTERVAL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
"""Seconds between the executor's questions to the node, on loopback, for a task; Flower's default is 1."""
REFUSED = "Failed to activate SuperNode"
"""Flower's message for a node that it counts as connected, and for one whose key it no longer accepts."""


def run_node(home: SiteHome, launcher: str = "", processes: int = 0) -> None:
    """Take part in the study until terminated; `launcher` and `processes` replace those of the site's config.

    The server counts a killed node as connected until it has missed two heartbeats, about a minute; until then it
    refuses a new node, which tries again.

    Raises:
        ConfigError: the launcher cannot train in so many processes here.
        DeploymentError: the site is not admitted or revoked, another node of this home runs, or a process ended.
        ApprovalError: the kit was not approved.
        LdError: the home, its config or its key cannot be used.
    """
    kit = home.kit()
    process_count(home.site().launched(launcher, processes))
    check_bundle(home, kit.bundle_digest)
    check_approved(home, kit.study_digest, kit.base_digest, kit.modality_digest)
    ensure_certificate(home)
    with _only_node(home), _secret(home) as secret:
        port = free_port()
        runtime = ["--superexec-auth-secret-file", str(secret)]
        node = [tool("flower-supernode"), "--superlink", kit.server, "--isolation", "process", *runtime]
        node += ["--root-certificates", str(home.kit_folder / "authority.crt")]
        node += ["--auth-supernode-private-key", str(home.node_key)]
        place = json.dumps(str(home.path), ensure_ascii=False)
        config = [f"home={place}"]
        config += [f"{LAUNCHER}={json.dumps(launcher)}"] if launcher else []
        config += [f"{PROCESSES}={processes}"] if processes else []
        node += ["--node-config", " ".join(config), "--host", "127.0.0.1", "--port", str(port)]
        executor = [sys.executable, "-m", "ld_client.deployment.executor", str(home.path), "--insecure", *runtime]
        executor += ["--runtime-api-address", f"127.0.0.1:{port}", "--parent-pid", str(os.getpid())]
        print(
            f"site {kit.site} takes part in study '{kit.study}' at {kit.server}; stop it with Ctrl-C or SIGTERM",
            flush=True,
        )
        deadline, printed = time.monotonic() + FORMER_NODE_SECONDS, False
        while REFUSED in _watch(home, [node, executor]) and time.monotonic() < deadline:
            fetch_certificate(home)  # raises where the study has revoked the site, or admitted another key
            if not printed:
                print("the server still counts this site's former node: trying again until it does not", flush=True)
            printed = True
            time.sleep(RETRY_SECONDS)
        raise DeploymentError(f"the site's node ended: see '{home.path / 'node.log'}'")


def _watch(home: SiteHome, commands: list[list[str]]) -> str:
    """Run the commands until one of them ends; returns what they wrote to the log."""
    # without it, Python would search the current folder for code
    surroundings = environment(home.path / "flower") | {"PYTHONSAFEPATH": "1", TASK_INTERVAL: "0.2"}
    started: list[subprocess.Popen[bytes]] = []
    path = home.path / "node.log"
    before = path.stat().st_size if path.exists() else 0
    with plain_log(path, LOG_SECONDS) as log:
        try:
            for command in commands:
                started.append(subprocess.Popen(command, env=surroundings, stdout=log, stderr=log, cwd=home.path))
            while all(process.poll() is None for process in started):
                time.sleep(POLL_SECONDS)
        finally:
            for process in started:
                stop_family(process.pid)
    with path.open("rb") as written:
        written.seek(before)
        return written.read().decode(errors="replace")


@contextlib.contextmanager
def _only_node(home: SiteHome) -> Iterator[None]:
    """Hold the home's lock. Processes that a killed node left running are ended first: they hold the site's key."""
    with held(home.path / "node.lock", DeploymentError(f"a node of '{home.path}' is running already")):
        stop_holders("flower-supernode", str(home.node_key))
        yield


@contextlib.contextmanager
def _secret(home: SiteHome) -> Iterator[Path]:
    """File of the secret that authenticates the executor to the node; other accounts cannot read it."""
    path = home.path / "executor.secret"
    path.unlink(missing_ok=True)
    write_new(path, secrets.token_bytes(32))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
