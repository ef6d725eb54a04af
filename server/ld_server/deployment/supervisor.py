"""`ld-server start`: runs Flower's SuperLink, the fleet proxy in front of it, and the release service."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator

from ld_common.core.atomic_files import held
from ld_common.core.errors import DeploymentError
from ld_common.core.processes import stop_family, stop_holders
from ld_server.deployment import superlink
from ld_server.deployment.fleet_proxy import proxy_server
from ld_server.deployment.provision import synchronize
from ld_server.deployment.release_service import start_release_service
from ld_server.deployment.study_home import StudyHome, address

POLL_SECONDS = 0.5
GRACE_SECONDS = 2.0


def serve(home: StudyHome) -> None:
    """Serve until terminated; a SuperLink that dies is started again with its database.

    Raises:
        DeploymentError: another server of this home runs, or a port is in use.
    """
    with _only_server(home.check()), _link_kept_alive(home), _release_service(home):
        synchronize(home)
        server = home.server()
        print(
            f"sites reach the study at {address(server.hosts[0], server.gate_port)}; stop it with Ctrl-C or SIGTERM",
            flush=True,
        )
        proxy_server(home).run()  # returns on SIGTERM and SIGINT


@contextlib.contextmanager
def _only_server(home: StudyHome) -> Iterator[None]:
    """Hold the home's lock. Processes that a killed server left running are ended first: they use our ports."""
    with held(home.path / "server.lock", DeploymentError(f"a server of '{home.path}' is running already")):
        stop_holders("flower-superlink", str(superlink.database(home)))
        yield


@contextlib.contextmanager
def _link_kept_alive(home: StudyHome) -> Iterator[None]:
    process, stopped = superlink.start_link(home), threading.Event()
    watcher = threading.Thread(target=_keep_alive, args=(home, process, stopped))
    watcher.start()
    try:
        yield
    finally:
        stopped.set()
        watcher.join()


def _keep_alive(home: StudyHome, process: subprocess.Popen[bytes], stopped: threading.Event) -> None:
    while not stopped.wait(POLL_SECONDS):
        if process.poll() is None:
            continue
        print("Flower's SuperLink died and is started again; continue with ld-server run --resume", flush=True)
        try:
            process = superlink.start_link(home)
            synchronize(home)
        except DeploymentError as error:
            print(f"error: {error}", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            break
    stop_family(process.pid)


@contextlib.contextmanager
def _release_service(home: StudyHome) -> Iterator[None]:
    server = home.server()
    service = start_release_service(home, address(server.bind, server.release_port))
    try:
        yield
    finally:
        service.stop(GRACE_SECONDS).wait()
