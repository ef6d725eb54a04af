"""One round of many sites through a real SuperLink: stub nodes that speak Flower's Fleet API, and train nothing.

    python -m ld_simulations.benchmarks.performance.stub_nodes 1000

SuperLink, run and ServerApp are those of a deployed study, with TLS and a key for each site. The stub nodes share one
process and a few threads. Each has a TLS connection of its own, logs in with its key, pulls the code and its task as
Flower's node does, and signs a result: the adapter that it got, changed a little.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.core.errors import FederationError
from ld_common.core.processes import free_ports, stop_family
from ld_common.protocol.site_keys import public_keys
from ld_server.deployment import superlink
from ld_server.deployment.provision import provision, synchronize
from ld_server.deployment.study_home import AdmittedSite, StudyHome, now, server_config
from ld_server.round_log import FAILURE, read_rounds
from ld_simulations.benchmarks.performance.fleet_stub import HEARTBEAT_SECONDS, StubNodes

POLL_SECONDS = 0.5
WAIT_SECONDS, ROUND_SECONDS = 120.0, 1800.0
"""For the nodes, and for the replies of a round."""
OPEN_FILES = 16384
BASE = "simulations/tiny_base"
MODALITY = "configs/modalities/brain_mri.yaml"
PROCESSES = {"superlink": "flower-superlink", "server_app": "flwr-serverapp"}


class PeakMemory:
    """Samples the resident memory of the processes of `PROCESSES` below a process, until the block ends."""

    def __init__(self, parent: int) -> None:
        self.peak_mb = dict.fromkeys(PROCESSES, 0.0)
        self._parent = psutil.Process(parent)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            with contextlib.suppress(psutil.Error):
                for process in [self._parent, *self._parent.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        self._count(process)

    def _count(self, process: psutil.Process) -> None:
        command = [Path(word).name for word in process.cmdline()[:2]]
        for name, tool in PROCESSES.items():
            if tool in command:
                self.peak_mb[name] = max(self.peak_mb[name], process.memory_info().rss / 2**20)


def study_home(folder: Path, sites: list[str], rounds: int) -> StudyHome:
    """Provision a study of LoRA on the tiny base for these sites."""
    study = {
        "name": "many-sites",
        "base_model": str(Path(BASE).resolve()),
        "modality": str(Path(MODALITY).resolve()),
        "adapter": {"name": "lora", "rank": 2},
        "drift": {"shape": "none"},
        "training": {"steps": 1},
        "federation": {
            "rounds": rounds,
            "sites": sites,
            "min_train_nodes": 2,
            "validate_every": 0,
            "wait_seconds": WAIT_SECONDS,
            "round_timeout_seconds": ROUND_SECONDS,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    names = ("gate", "release", "link")
    ports = [f"{name}_port={port}" for name, port in zip(names, free_ports(len(names)), strict=True)]
    settings, _ = server_config(["hosts=[localhost]", "bind=127.0.0.1", *ports])
    return provision(file, folder / "server", settings)


def run(
    folder: Path, nodes: int = 1000, rounds: int = 1, heartbeat_seconds: float = HEARTBEAT_SECONDS
) -> dict[str, Any]:
    """Run a study of many sites, which train nothing.

    Args:
        folder: where the study's home is made; empty.
        nodes: number of sites.
        rounds: of the study.
        heartbeat_seconds: between a node's signs of life; without one for twice as long, Flower counts it as absent.
            Where the SuperLink cannot answer all nodes in that time, they come and go.

    Returns:
        For each step its seconds (`provision`, `register`: keys at the SuperLink, `activate`: logins, `round`: the
        slowest round by the server's clock), `replies` that counted in the last round and `left_out`, peak memory
        in MiB of SuperLink and ServerApp, bytes and requests of all nodes in all rounds, and what had to be retried.

    Raises:
        FederationError: a round did not end, or the study has no release.
    """
    _allow_open_files()
    started = time.monotonic()
    sites = [f"site-{number:04d}" for number in range(1, nodes + 1)]
    home = study_home(folder, sites, rounds)
    seconds = {"provision_seconds": time.monotonic() - started}
    link = superlink.start_link(home)
    try:
        stubs = StubNodes(sites, superlink.link_address(home), home.certificate("authority"), heartbeat_seconds)
        started = time.monotonic()
        home.write_sites({node.site: AdmittedSite(node.site, public_keys(node.keys), now()) for node in stubs.nodes})
        synchronize(home)
        seconds["register_seconds"] = time.monotonic() - started
        started = time.monotonic()
        stubs.activate()
        seconds["activate_seconds"] = time.monotonic() - started
        with PeakMemory(link.pid) as memory, stubs.running():
            _run_to_end(home, rounds * (WAIT_SECONDS + 2 * ROUND_SECONDS))
    finally:
        stop_family(link.pid)
    records = [record for record in read_rounds(home.run) if record.counted]
    if len(records) < rounds:
        failure = home.run / FAILURE
        reason = failure.read_text() if failure.exists() else "; ".join(stubs.failures[:3])
        raise FederationError(f"{len(records)} of {rounds} rounds counted: {reason} (log: {home.path / 'link.log'})")
    traffic = stubs.traffic
    return {
        "nodes": nodes,
        "rounds": rounds,
        **seconds,
        "round_seconds": max(record.seconds for record in records),
        "replies": len(records[-1].sites),
        "left_out": len(records[-1].left_out),
        **{f"{name}_peak_mb": peak for name, peak in memory.peak_mb.items()},
        "sent_bytes": traffic.sent_bytes,
        "received_bytes": traffic.received_bytes,
        "requests": traffic.requests,
        "retries": traffic.retries,
        "failed_calls": len(stubs.failures),
    }


def _run_to_end(home: StudyHome, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    with superlink.control(home) as client:
        started = superlink.start_run(client, home, resume=False)
        while superlink.run_status(client, started)[0] != superlink.FINISHED:
            if time.monotonic() > deadline:
                raise FederationError(f"the study in '{home.path}' still runs after {seconds:.0f} s")
            time.sleep(POLL_SECONDS)


def _allow_open_files() -> None:
    """Each node has a connection of its own; the SuperLink inherits the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="ld-") as place:
        print(json.dumps(run(Path(place), int(sys.argv[1]) if len(sys.argv) > 1 else 1000), indent=1))
