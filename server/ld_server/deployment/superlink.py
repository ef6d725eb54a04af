"""Flower's SuperLink of a study: started on loopback, and controlled over its Control API."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives import serialization
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from ld_common.core.errors import DeploymentError
from ld_common.core.plain_log import plain_log
from ld_common.core.processes import environment, no_proxy, tool
from ld_common.protocol.keys import PublicKey
from ld_server.deployment.study_home import StudyHome

Answer = TypeVar("Answer")
LOOPBACK = "127.0.0.1"
STARTUP_SECONDS = 60.0
POLL_SECONDS = 0.2
BUSY_SECONDS = 120.0
FINISHED = "finished"
REVOKED_KEY = (
    "a revoked key cannot be admitted again: the site makes new ones (it removes the folder keys of its home, then "
    "ld-client init and enroll)"
)


@dataclass(frozen=True)
class Node:
    """A site's node as the SuperLink knows it."""

    id: int
    public_key: bytes
    """PEM."""
    status: str
    """One of Flower's `NodeStatus`."""

    @property
    def registered(self) -> bool:
        """Whether Flower accepts it."""
        return self.status != NodeStatus.UNREGISTERED


def link_address(home: StudyHome) -> str:
    """`host:port` of the SuperLink."""
    return f"{LOOPBACK}:{home.server().link_port}"


def database(home: StudyHome) -> Path:
    """The SuperLink's database."""
    return home.path / "link.db"


def start_link(home: StudyHome) -> subprocess.Popen[bytes]:
    """Start the study's SuperLink with its database and wait until it answers; its log is
    `link.log`, without escape codes.

    Raises:
        DeploymentError: it does not start.
    """
    server, log = home.server(), home.path / "link.log"
    command = [tool("flower-superlink"), "--enable-supernode-auth"]
    command += ["--ssl-certfile", str(home.certificate("server")), "--ssl-keyfile", str(home.keys / "server.key")]
    command += ["--ssl-ca-certfile", str(home.certificate("authority"))]
    command += ["--host", LOOPBACK, "--port", str(server.link_port), "--database", str(database(home))]
    command += ["--disable-runtime-dependency-installation"]
    with plain_log(log) as stream:
        process = subprocess.Popen(command, env=environment(home.path / "flower"), stdout=stream, stderr=stream)
    deadline = time.monotonic() + STARTUP_SECONDS
    with httpx.Client(verify=str(home.certificate("authority")), trust_env=False) as client:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if client.get(f"https://{link_address(home)}/health", timeout=1).is_success:
                    return process
            time.sleep(POLL_SECONDS)
    process.kill()
    process.wait()
    raise DeploymentError(f"Flower's SuperLink did not start on port {server.link_port}: see '{log}'")


@contextlib.contextmanager
def control(home: StudyHome) -> Iterator[ControlHttpClient]:
    """The SuperLink's Control API.

    Raises:
        DeploymentError: it does not answer, or refuses.
    """
    os.environ.update(no_proxy())  # Flower's client uses the environment's proxy, also for loopback
    try:
        client = ControlHttpClient.from_server_address(
            server_address=link_address(home),
            insecure=False,
            root_certificates=home.certificate("authority").read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="ld-server")],
        )
        with contextlib.closing(client):
            yield client
    except httpx.RequestError as error:
        raise DeploymentError(f"no server of '{home.path}' answers: start it with ld-server start") from error
    except httpx.HTTPStatusError as error:
        raise DeploymentError(f"Flower's SuperLink refuses: {_reason(error.response)}") from error


def nodes(client: ControlHttpClient) -> list[Node]:
    """All nodes that were ever registered; former ones have the status `unregistered`."""
    listed = _asked(lambda: client.ListNodes(ListNodesRequest())).nodes_info
    return [Node(node.node_id, node.public_key, node.status) for node in listed]


def register_node(client: ControlHttpClient, key: PublicKey) -> None:
    """Register a key unless it is registered; raises `DeploymentError` as `check_not_revoked`."""
    check_not_revoked(client, key)
    if not any(node.public_key == pem(key) for node in nodes(client)):
        register_new(client, key)


def register_new(client: ControlHttpClient, key: PublicKey) -> None:
    """Register a key that was never registered."""
    client.RegisterNode(RegisterNodeRequest(public_key=pem(key)))


def check_not_revoked(client: ControlHttpClient, key: PublicKey) -> None:
    """Raise `DeploymentError` for a key that was unregistered before, which Flower never accepts again."""
    if any(node.public_key == pem(key) and not node.registered for node in nodes(client)):
        raise DeploymentError(REVOKED_KEY)


def unregister_node(client: ControlHttpClient, key: PublicKey) -> None:
    """Unregister a key at once, for good, if it is registered."""
    for node in nodes(client):
        if node.registered and node.public_key == pem(key):
            unregister(client, node)


def unregister(client: ControlHttpClient, node: Node) -> None:
    """Unregister a registered node."""
    client.UnregisterNode(UnregisterNodeRequest(node_id=node.id))


def start_run(client: ControlHttpClient, home: StudyHome, resume: bool) -> int:
    """Start the study with exactly the bundle of its home; returns Flower's run id."""
    bundle = home.bundle.read_bytes()
    fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
    config = user_config_to_proto({"home": str(home.path), "resume": resume})
    answer = client.StartRun(StartRunRequest(fab=fab_to_proto(fab), override_config=config))
    if not answer.HasField("run_id"):
        raise DeploymentError("Flower's SuperLink did not start the run: see link.log")
    return int(answer.run_id)


def active_run(client: ControlHttpClient) -> int | None:
    """The run that has not ended, or None."""
    runs = _asked(lambda: client.ListRuns(ListRunsRequest())).run_dict
    return next((int(number) for number, run in runs.items() if run.status.status != FINISHED), None)


def run_status(client: ControlHttpClient, run_id: int) -> tuple[str, str]:
    """A run's status and sub-status: (`running`, ``), (`finished`, `completed`), ..."""
    status = _asked(lambda: client.ListRuns(ListRunsRequest(run_id=run_id))).run_dict[run_id].status
    return status.status, status.sub_status


def stop_run(client: ControlHttpClient, run_id: int) -> None:
    """Stop a run unless it has ended."""
    if run_status(client, run_id)[0] != FINISHED:
        client.StopRun(StopRunRequest(run_id=run_id))


def pem(key: PublicKey) -> bytes:
    """A public key as Flower stores a node's."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _asked(question: Callable[[], Answer]) -> Answer:
    """The answer to a question that changes nothing, asked again while hundreds of nodes keep the database locked."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return question()
        except (httpx.HTTPStatusError, httpx.TimeoutException) as error:
            refused = isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error
            if refused or time.monotonic() > deadline:
                raise
        time.sleep(POLL_SECONDS)


def _reason(response: httpx.Response) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(response.content)["detail"])
    return f"status {response.status_code}"
