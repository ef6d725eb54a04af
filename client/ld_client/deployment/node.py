"""`ld-client start`: the node, which fetches the study's work, and the executor, which runs what was approved."""

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
from ld_common.core.atomic_files import held
from ld_common.core.errors import DeploymentError
from ld_common.core.processes import environment, free_port, stop_family, stop_holders, tool

POLL_SECONDS, RETRY_SECONDS, FORMER_NODE_SECONDS = 0.5, 5.0, 120.0
REFUSED = "Failed to activate SuperNode"
"""What Flower says of a node that it counts already, and of one whose key it no longer takes."""


def run_node(home: SiteHome) -> None:
    """Take part in the study until told to end.

    A node that was killed counts as connected at the server until it has missed two heartbeats, about a minute; until
    then a new one is refused, and tried again.

    Raises:
        DeploymentError: not admitted, revoked, another node of this home runs, or one of the two processes ended.
        ApprovalError: the kit was not approved.
        LdError: the home, its config or its key cannot be used.
    """
    kit = home.kit()
    home.site()
    check_bundle(home, kit.bundle_digest)
    check_approved(home, kit.study_digest, kit.base_digest, kit.modality_digest)
    ensure_certificate(home)
    with _only_node(home), _secret(home) as secret:
        port = free_port()
        runtime = ["--superexec-auth-secret-file", str(secret)]
        node = [tool("flower-supernode"), "--superlink", kit.server, "--isolation", "process", *runtime]
        node += ["--root-certificates", str(home.kit_folder / "authority.crt")]
        node += ["--auth-supernode-private-key", str(home.key_file)]
        place = json.dumps(str(home.path), ensure_ascii=False)
        node += ["--node-config", f"home={place}", "--host", "127.0.0.1", "--port", str(port)]
        executor = [sys.executable, "-m", "ld_client.deployment.executor", str(home.path), "--insecure", *runtime]
        executor += ["--runtime-api-address", f"127.0.0.1:{port}", "--parent-pid", str(os.getpid())]
        print(
            f"site {kit.site} of study '{kit.study}' works for {kit.server}; end it with Ctrl-C or SIGTERM", flush=True
        )
        deadline, told = time.monotonic() + FORMER_NODE_SECONDS, False
        while REFUSED in _watch(home, [node, executor]) and time.monotonic() < deadline:
            fetch_certificate(home)  # says so where the study has revoked the site, or has another key of it
            if not told:
                print("the server still counts this site's former node: trying until it does not", flush=True)
            told = True
            time.sleep(RETRY_SECONDS)
        raise DeploymentError(f"the site's node ended: see '{home.path / 'node.log'}'")


def _watch(home: SiteHome, commands: list[list[str]]) -> str:
    """Run the commands until one of them ends; returns what the log says since."""
    # the folder in which somebody happens to stand is not searched for code
    surroundings = environment(home.path / "flower") | {"PYTHONSAFEPATH": "1"}
    started: list[subprocess.Popen[bytes]] = []
    try:
        path = home.path / "node.log"
        with path.open("ab") as log:
            before = log.tell()
            for command in commands:
                started.append(subprocess.Popen(command, env=surroundings, stdout=log, stderr=log, cwd=home.path))
        while all(process.poll() is None for process in started):
            time.sleep(POLL_SECONDS)
        with path.open("rb") as written:
            written.seek(before)
            return written.read().decode(errors="replace")
    finally:
        for process in started:
            stop_family(process.pid)


@contextlib.contextmanager
def _only_node(home: SiteHome) -> Iterator[None]:
    """Hold the home's lock; what a killed node left running is ended first: it holds the site's key."""
    with held(home.path / "node.lock", DeploymentError(f"a node of '{home.path}' runs already")):
        stop_holders("flower-supernode", str(home.key_file))
        yield


@contextlib.contextmanager
def _secret(home: SiteHome) -> Iterator[Path]:
    """What the executor proves itself to the node with; other accounts of the machine cannot read it."""
    path = home.path / "executor.secret"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(secrets.token_bytes(32))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
