"""A study's server and its hospitals as real processes, each with a folder of its own."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from ld_client.deployment.approve import approve
from ld_client.deployment.join import enrolment, join
from ld_client.deployment.site_home import SiteHome
from ld_common.core.errors import DeploymentError
from ld_common.core.processes import environment, free_ports, stop_family, stop_holders, tool
from ld_server.deployment.provision import admit, provision, study_fingerprint
from ld_server.deployment.study_home import StudyHome, server_config
from ld_server.deployment.superlink import control, nodes

STARTUP_SECONDS = 120.0
POLL_SECONDS = 0.5
SERVER, RUN = "server", "run"


class Deployment:
    """A provisioned study, its admitted and approving hospitals, and their running processes."""

    def __init__(self, study_file: Path, overrides: Sequence[str], configs: Path, folder: Path) -> None:
        """Provision a study and a home for each of its sites.

        Args:
            study_file: YAML of the study.
            overrides: `key=value` for it.
            configs: folder with a YAML for each site, whose paths are absolute.
            folder: where everything of the deployment lies.
        """
        self.folder = folder.resolve()
        self.sites: dict[str, SiteHome] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        names = ("gate", "release", "link")
        ports = [f"{name}_port={port}" for name, port in zip(names, free_ports(len(names)), strict=True)]
        settings, _ = server_config(["hosts=[localhost]", "bind=127.0.0.1", *ports])
        self.home: StudyHome = provision(study_file, self.folder / "server", settings, overrides)
        for name in self.home.study()[0].federation.sites:
            path = self.folder / name
            join(self.home.kits / f"{name}.kit", path, study_fingerprint(self.home))
            content = yaml.safe_load((configs / f"{name}.yaml").read_text()) | {"modality": "kit/modality.yaml"}
            (path / "site.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
            self.sites[name] = SiteHome(path)

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """Run the server, with every site admitted and approving; all processes end with the block."""
        try:
            self.start(SERVER)
            self.wait_for_gate()
            for name, site in self.sites.items():
                admit(self.home, name, enrolment(site))
                approve(site)
            yield
        finally:
            self.stop()

    def start(self, name: str, *arguments: str) -> None:
        """Start the `server`, the `run` (arguments such as `--resume`) or a site's node, with its log beside it."""
        if name == SERVER:
            command = [tool("ld-server"), "start", str(self.home.path)]
        elif name == RUN:
            command = [tool("ld-server"), "run", str(self.home.path), *arguments]
        else:
            command = [tool("ld-client"), "start", "--home", str(self.sites[name].path)]
        with (self.folder / f"{name}.log").open("ab") as log:
            # one thread each: the sites share the machine's processors
            surroundings = environment(self.folder / "flower") | {"OMP_NUM_THREADS": "1"}
            self.processes[name] = subprocess.Popen(command, env=surroundings, stdout=log, stderr=log)

    def ended(self, name: str) -> int | None:
        """The exit code of a process that ended; None while it runs."""
        return self.processes[name].poll()

    def wait_for_gate(self) -> None:
        """Wait until the fleet proxy answers; raises `DeploymentError`."""
        url = f"https://localhost:{self.home.server().gate_port}/health"
        deadline = time.monotonic() + STARTUP_SECONDS
        authority = self.home.certificate("authority")
        while time.monotonic() < deadline and self.ended(SERVER) is None:
            if authority.exists():
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(url, verify=str(authority), timeout=2, trust_env=False).is_success:
                        return
            time.sleep(POLL_SECONDS)
        raise DeploymentError(f"the server did not start: see '{self.folder / 'server.log'}'")

    def wait_for_link(self) -> None:
        """Wait until the SuperLink behind the fleet proxy answers; raises `DeploymentError`."""
        deadline = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(DeploymentError), control(self.home) as client:
                nodes(client)
                return
            time.sleep(POLL_SECONDS)
        raise DeploymentError(f"the SuperLink did not come back: see '{self.home.path / 'link.log'}'")

    def wait(self, name: str, seconds: float) -> int:
        """Wait for a process to end; returns its exit code, raises `DeploymentError` when it takes longer."""
        try:
            return self.processes[name].wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise DeploymentError(f"'{name}' still runs after {seconds:g} s: see its log") from error

    def kill(self, name: str) -> bool:
        """SIGKILL one process; its children become orphans.

        Returns whether the signal ended it.
        """
        self.processes[name].kill()
        return self.processes[name].wait() == -signal.SIGKILL

    def kill_below(self, name: str, command: str) -> bool:
        """SIGKILL the child processes of `name` with that command; returns whether there was one."""
        matching = [process for process in self.family(name) if command in " ".join(cmdline(process))]
        killed = 0
        for process in matching:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                killed += 1
        return killed > 0

    def family(self, name: str) -> list[psutil.Process]:
        """All child processes of a process of the deployment."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.processes[name].pid).children(recursive=True)
        return []

    def stop(self, names: Sequence[str] = ()) -> None:
        """End processes (all by default) with their children, orphans of killed ones included."""
        for name in names or [RUN, *self.sites, SERVER]:
            if name in self.processes:
                stop_family(self.processes.pop(name).pid)
        if not names:
            stop_holders("flower-superlink", str(self.home.path / "link.db"))
            for site in self.sites.values():
                stop_holders("flower-supernode", str(site.node_key))

    def log(self, name: str) -> str:
        """The output of a process."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""


def cmdline(process: psutil.Process) -> list[str]:
    """A process's command line; empty when it is gone."""
    with contextlib.suppress(psutil.Error):
        arguments: list[Any] = process.cmdline()
        return arguments
    return []
