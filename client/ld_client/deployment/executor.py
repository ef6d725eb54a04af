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

import psutil
from flwr.proto.task_pb2 import Task
from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import LaunchResult
from flwr.supercore.superexec.plugin import AutoExecPlugin

import ld_common.core.offline  # noqa: F401  (before Flower)
from ld_client.deployment.approvals import check_bundle
from ld_client.deployment.launcher import FORK_TASKS, TOKEN, task_request
from ld_client.deployment.site_home import SiteHome
from ld_common.core.errors import DeploymentError, LdError

CLIENT_APP = "flwr-clientapp"
MOST_TASKS = 4
"""One task runs, the others wait for it; each holds a process with the model libraries."""
Lives = Callable[[], bool]
"""Whether a task's process has not ended."""
Launch = Callable[[list[str], str], Lives]
"""Starts a task's process, given the arguments of `flwr-clientapp` and the task's token."""


class ForkedTasks:
    """Starts each task as a fork of one process that has loaded the model libraries (`launcher.fork_tasks`)."""

    def __init__(self, home: SiteHome) -> None:
        self._command = [sys.executable, "-m", "ld_client.deployment.launcher", str(home.path), FORK_TASKS]
        self.process: subprocess.Popen[bytes]
        """The process with the libraries, which ends with this one."""
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, arguments: list[str], token: str) -> Lives:
        """Start a task.

        Raises:
            DeploymentError: the process with the libraries has died; the next call starts another.
        """
        if self.process.poll() is not None:
            self._start()
        requests, answers = self.process.stdin, self.process.stdout
        try:
            if requests is None or answers is None:
                raise ValueError("no pipes")
            requests.write(task_request(arguments, token))
            requests.flush()
            return psutil.Process(int(answers.readline())).is_running
        except (OSError, ValueError, psutil.Error) as error:
            self.process.kill()
            raise DeploymentError("the process that starts tasks died: ask again") from error


def fresh_tasks(home: SiteHome) -> Launch:
    """Starts each task as a new process, which loads the model libraries itself."""

    def launch(arguments: list[str], token: str) -> Lives:
        command = [sys.executable, "-m", "ld_client.deployment.launcher", str(home.path), *arguments]
        process = subprocess.Popen(command, env=os.environ | {TOKEN: token})
        return lambda: process.poll() is None

    return launch


def launch_for(home: SiteHome) -> Launch:
    """Forks on a processor. CUDA must not be used after a fork, so a task on a GPU is a new process."""
    return ForkedTasks(home) if home.site().device == "cpu" else fresh_tasks(home)


def approved_only(home: SiteHome, launch: Launch) -> type[AutoExecPlugin]:
    """Flower's plug-in to launch a task, which checks the site's approvals and runs `ld_client.deployment.launcher`.

    At most `MOST_TASKS` tasks are alive at once; the ClientApp lets one at a time pass.
    """
    alive: list[Lives] = []

    class ApprovedOnly(AutoExecPlugin):
        """Launches client code of approved bundles only."""

        def launch_task(self, token: str, task: Task) -> LaunchResult:
            """Launch a task, or refuse it before any of its code runs."""
            try:
                if task.type != CLIENT_APP:
                    return LaunchResult.failed(f"a site runs client code only, not '{task.type}'")
                alive[:] = [lives for lives in alive if lives()]
                if len(alive) >= MOST_TASKS:
                    return LaunchResult.failed(f"{len(alive)} tasks run or wait at this site: ask again later")
                check_bundle(home, task.fab_hash)
                arguments = ["--runtime-api-address", self.runtime_api_address, "--insecure"]
                alive.append(launch([*arguments, "--parent-pid", str(os.getpid())], token))
            except LdError as error:
                return LaunchResult.failed(str(error))
            return LaunchResult.accepted()

    return ApprovedOnly


def main() -> None:
    """Run the site's executor, which ends with the node that started it."""
    home = SiteHome(Path(sys.argv.pop(1)))
    if run_superexec.AutoExecPlugin is not AutoExecPlugin:
        raise SystemExit(
            "this version of Flower launches tasks in another way, so approvals cannot be enforced: install flwr 1.41"
        )
    run_superexec.AutoExecPlugin = approved_only(home, launch_for(home))
    flower_superexec()


if __name__ == "__main__":
    main()
