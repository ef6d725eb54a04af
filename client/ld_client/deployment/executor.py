"""Runs approved code of a study: a Flower SuperExec that checks the bundle's hash first.

    python -m ld_client.deployment.executor HOME --runtime-api-address ... (the rest as flower-superexec)

The study chooses the code, and Flower 1.41 runs any bundle that comes. This process belongs to the site: it is started
from the installed package, never from a bundle.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from flwr.proto.task_pb2 import Task
from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import LaunchResult
from flwr.supercore.superexec.plugin import AutoExecPlugin

import ld_common.core.offline  # noqa: F401  (before Flower)
from ld_client.deployment.approvals import check_bundle
from ld_client.deployment.launcher import TOKEN
from ld_client.deployment.site_home import SiteHome
from ld_common.core.errors import LdError

CLIENT_APP = "flwr-clientapp"
MOST_TASKS = 4
"""One task runs, the others wait for it; each holds a process with the model libraries."""


class TaskProcess(Protocol):
    """What is used of `subprocess.Popen`."""

    def poll(self) -> int | None:
        """None while the process runs."""


Launch = Callable[[list[str], dict[str, str]], TaskProcess]


def start_process(command: list[str], environment: dict[str, str]) -> TaskProcess:
    """Start a task's process, which ends with this one."""
    return subprocess.Popen(command, env=environment)


def approved_only(home: SiteHome, launch: Launch = start_process) -> type[AutoExecPlugin]:
    """Flower's plug-in to launch a task, which checks the site's approvals and runs `ld_client.deployment.launcher`.

    At most `MOST_TASKS` tasks are alive at once; the ClientApp lets one at a time pass.
    """
    alive: list[TaskProcess] = []

    class ApprovedOnly(AutoExecPlugin):
        """Launches client code of approved bundles only."""

        def launch_task(self, token: str, task: Task) -> LaunchResult:
            """Launch a task, or refuse it before any of its code runs."""
            try:
                if task.type != CLIENT_APP:
                    return LaunchResult.failed(f"a site runs client code only, not '{task.type}'")
                alive[:] = [process for process in alive if process.poll() is None]
                if len(alive) >= MOST_TASKS:
                    return LaunchResult.failed(f"{len(alive)} tasks run or wait at this site: ask again later")
                check_bundle(home, task.fab_hash)
            except LdError as error:
                return LaunchResult.failed(str(error))
            command = [sys.executable, "-m", "ld_client.deployment.launcher", str(home.path)]
            command += ["--runtime-api-address", self.runtime_api_address, "--insecure"]
            command += ["--parent-pid", str(os.getpid())]
            alive.append(launch(command, os.environ | {TOKEN: token}))
            return LaunchResult.accepted()

    return ApprovedOnly


def main() -> None:
    """Run the site's executor, which ends with the node that started it."""
    home = SiteHome(Path(sys.argv.pop(1)))
    if run_superexec.AutoExecPlugin is not AutoExecPlugin:
        raise SystemExit(
            "this version of Flower launches tasks in another way, so approvals cannot be enforced: install flwr 1.41"
        )
    run_superexec.AutoExecPlugin = approved_only(home)
    flower_superexec()


if __name__ == "__main__":
    main()
