"""A simulated federation on a Ray cluster of several nodes, all on this machine's loopback.

    python -m ld_simulations.benchmarks.performance.ray_cluster

Each node has processors for one site, so as many sites train at once as there are nodes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ld_common.core.errors import FederationError
from ld_common.core.offline import DEFAULTS  # importing it also turns off Ray's usage statistics here
from ld_common.core.processes import free_ports, stop_family, tool
from ld_server.round_log import read_rounds
from ld_simulations.demo import load_demo
from ld_simulations.federation import run_federation
from ld_simulations.preparation import prepare_sites

LOOPBACK = "127.0.0.1"
STORE_BYTES = 128 << 20
"""Shared memory of each node."""
STARTUP_SECONDS, POLL_SECONDS = 60.0, 0.5
DEMO = "configs/demo.yaml"
SMALL = ("patients=2", "test_patients=1", "training.steps=4", "training.batch_size=2", "federation.rounds=2")


@contextlib.contextmanager
def local_cluster(nodes: int) -> Iterator[str]:
    """A Ray cluster of nodes with one processor each; yields its address, ends its processes with the block.

    Raises:
        FederationError: it does not come up.
    """
    folder = tempfile.mkdtemp(prefix="ld-ray-")  # short: the paths of Ray's sockets are limited
    head, client = free_ports(2)
    address = f"{LOOPBACK}:{head}"
    options = ["--num-cpus", "1", "--object-store-memory", str(STORE_BYTES), "--node-ip-address", LOOPBACK]
    options += ["--min-worker-port", "0", "--max-worker-port", "0", "--disable-usage-stats", "--block"]
    first = ["--head", "--port", str(head), "--ray-client-server-port", str(client), "--include-dashboard", "false"]
    started: list[subprocess.Popen[bytes]] = []
    try:
        with Path(folder, "start.log").open("wb") as log:
            for place in [first, *[["--address", address]] * (nodes - 1)]:
                command = [tool("ray"), "start", *place, *options]
                surroundings = os.environ | DEFAULTS | {"RAY_TMPDIR": folder}
                started.append(subprocess.Popen(command, env=surroundings, stdout=log, stderr=log))
                _wait_for_nodes(address, len(started), started[-1])
        yield address
    finally:
        for process in reversed(started):
            stop_family(process.pid)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_nodes(address: str, count: int, last: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline and last.poll() is None:
        with contextlib.suppress(ConnectionError, RuntimeError), _connected(address) as ray:
            if sum(node["Alive"] for node in ray.nodes()) == count:
                return
        time.sleep(POLL_SECONDS)
    raise FederationError(f"node {count} of a Ray cluster on this machine did not start")


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    import ray

    host, _, port = address.partition(":")
    socket.create_connection((host, int(port)), POLL_SECONDS).close()  # Ray would try for a minute, and print
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield ray
    finally:
        ray.shutdown()


def actors_by_node(address: str) -> Counter[str]:
    """Actors that a cluster has run, by the id of their node; call it while the cluster runs."""
    with _connected(address):
        from ray._private.state import actors

        return Counter(actor["Address"]["NodeID"] for actor in actors().values())


def run(folder: Path, overrides: Sequence[str] = SMALL, nodes: int = 2, config: str = DEMO) -> dict[str, Any]:
    """Run a demo's federation on a local cluster.

    Args:
        folder: output of the demo.
        overrides: `key=value` of the demo, its study or its hospitals.
        nodes: of the cluster, with one processor each.
        config: YAML of the demo.

    Returns:
        `seconds` of the federation with Flower's start, `rounds` that counted, `sites`, and `nodes` that trained some.

    Raises:
        FederationError: the study ended without a release.
    """
    with local_cluster(nodes) as address:
        demo = load_demo(Path(config), [f"output={folder}", f"ray_address={address}", *overrides])
        prepare_sites(demo)
        started = time.monotonic()
        run_federation(demo)
        seconds = time.monotonic() - started
        used = actors_by_node(address)
    rounds = [record for record in read_rounds(Path(demo.study.output)) if record.counted]
    if not rounds:
        raise FederationError(f"no round of the study in '{folder}' counted")
    sites = sorted({name for record in rounds for name in record.sites})
    return {"seconds": seconds, "rounds": len(rounds), "sites": len(sites), "nodes": len(used)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="ld-") as place:
        print(json.dumps(run(Path(place)), indent=1))
