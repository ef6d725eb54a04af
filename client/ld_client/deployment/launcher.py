"""Runs one task in place of `flwr-clientapp`, and checks the bytes of the bundle that came.

    LD_TASK_TOKEN=... python -m ld_client.deployment.launcher HOME --runtime-api-address ... (as flwr-clientapp)

`ld_client.deployment.executor` starts it from the installed package. Flower's command differs in three ways: here the
bundle is hashed here and must be the approved one; its code is loaded from the folder to which this process unpacked
it, where Flower builds a path of the server's words; and an error before the ClientApp's own handler leaves without its
text. The ClientApp then limits the process to approved packages (`allow_approved_packages`). The token comes in the
environment, which other accounts cannot read.

    python -m ld_client.deployment.launcher HOME fork-tasks

loads the model libraries once and forks a process for each task, whose token comes through a pipe. The task's own code
is loaded after the fork, so no task sees anything of another.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import select
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from flwr.app.error import Error
from flwr.cli.install import install_from_fab
from flwr.clientapp import ClientApp
from flwr.clientapp.utils import get_load_client_app_fn
from flwr.common.config import get_metadata_from_config, get_project_config, get_project_dir
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
from flwr.supernode.runtime import run_clientapp

import ld_common.core.offline  # noqa: F401  (before Flower)
from ld_client.deployment.approvals import check_bundle
from ld_client.deployment.bundle import read_bundle
from ld_client.deployment.site_home import SiteHome
from ld_common.core.errors import ApprovalError
from ld_common.protocol.code_bundle import PACKAGES

TOKEN = "LD_TASK_TOKEN"
FORK_TASKS = "fork-tasks"
MAX_REQUEST = 2**16
FIXED_REASON = "the site failed for a reason that stays at the site"


class ApprovedCode:
    """The code of one task, in place of Flower's functions that unpack, locate and load a bundle."""

    def __init__(self, home: SiteHome) -> None:
        self.home = home
        self.folder: Path | None = None
        """Folder of the unpacked code; None before `unpack`."""
        self.digest = ""

    def unpack(self, fab: bytes, *arguments: Any, **options: Any) -> Path:
        """Unpack an approved bundle to a folder of this process, which nothing else writes; in place of
        `install_from_fab`.

        Raises:
            ApprovalError: the bundle is not approved, or holds other files than a study's code.
        """
        self.digest = hashlib.sha256(fab).hexdigest()
        check_bundle(self.home, self.digest)
        files = read_bundle(fab)
        folders = self.home.code_folders
        folders.mkdir(parents=True, exist_ok=True, mode=0o700)
        for former in folders.iterdir():
            owner = former.name.partition("-")[0]
            if not owner.isdecimal() or int(owner) == os.getpid() or not psutil.pid_exists(int(owner)):
                shutil.rmtree(former)
        self.folder = folders / f"{os.getpid()}-{self.digest}"
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.write_bytes(content)
        return self.folder

    def locate(self, fab_id: str, fab_version: str, fab_hash: str) -> Path:
        """The folder of `unpack`; in place of `get_project_dir`.

        Raises:
            ApprovalError: nothing was unpacked, or the words are not those of the bundle itself.
        """
        if self.folder is None:
            raise ApprovalError("no approved code was unpacked: refused")
        own = (*get_metadata_from_config(get_project_config(self.folder)), self.digest)
        if (fab_id, fab_version, fab_hash) != own:
            raise ApprovalError(
                f"the server calls the code {fab_id!r} {fab_version!r} {fab_hash!r}, the approved bundle is "
                f"'{own[0]}' '{own[1]}' '{own[2]}': refused"
            )
        return self.folder

    def loader(self, *arguments: Any, **options: Any) -> Callable[[str, str, str], ClientApp]:
        """A function that loads the ClientApp of the unpacked code; in place of `get_load_client_app_fn`."""

        def load(fab_id: str, fab_version: str, fab_hash: str) -> ClientApp:
            folder = self.locate(fab_id, fab_version, fab_hash)
            return get_load_client_app_fn("", str(folder), multi_app=True)(fab_id, fab_version, fab_hash)

        return load


def silent_error(code: int, reason: str | None = None) -> Error:
    """An error with its code and a fixed sentence in place of its text."""
    return Error(code=code, reason=FIXED_REASON)


def task_request(arguments: list[str], token: str) -> bytes:
    """The line that asks `fork_tasks` for a task."""
    return json.dumps([arguments, token]).encode() + b"\n"


def fork_tasks() -> tuple[list[str], str]:
    """Load the model libraries, then fork a process for each line of standard input, until its end.

    A fork writes its id to standard output. It alone reads its line, so a token is never in the process that other
    tasks are forked from.

    Returns:
        In each of the forked processes: the arguments of `flwr-clientapp`, and the token.
    """
    requests, answers = os.dup(0), os.dup(1)
    _detach()
    load_libraries()
    gc.freeze()  # the collector would write to pages that the tasks share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no ended task stays a zombie
    asked = select.poll()
    asked.register(requests, select.POLLIN)
    while any(event & select.POLLIN for _, event in asked.poll()):
        was_read, reads = os.pipe()
        if os.fork() == 0:
            line = os.read(requests, MAX_REQUEST)
            os.write(answers, b"%d\n" % os.getpid())
            for pipe in (requests, answers, was_read, reads):
                os.close(pipe)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            np.random.seed()  # else each task would draw the same numbers
            arguments, token = json.loads(line)
            return arguments, token
        os.close(reads)
        os.read(was_read, 1)  # ends when the fork closes its side, or dies
        os.close(was_read)
    raise SystemExit(0)


def load_libraries() -> None:
    """Import what a round imports; of ours the installed modules, which are dropped before a task's are loaded."""
    import peft  # noqa: F401
    from diffusers import DDIMScheduler, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    import ld_client.round  # noqa: F401


def _detach() -> None:
    """Leave the pipes of standard input and output: what is printed goes to the log, and no task reads a request."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)


def main() -> None:
    """Run one task."""
    home = SiteHome(Path(sys.argv.pop(1)))
    if sys.argv[1:] == [FORK_TASKS]:
        sys.argv[1:], token = fork_tasks()
    else:
        token = os.environ.pop(TOKEN)
    sys.argv += ["--token", token]
    code = ApprovedCode(home)
    replaced = {
        "install_from_fab": (install_from_fab, code.unpack),
        "get_project_dir": (get_project_dir, code.locate),
        "get_load_client_app_fn": (get_load_client_app_fn, code.loader),
        "Error": (Error, silent_error),
    }
    for name, (flowers, ours) in replaced.items():
        if getattr(run_clientapp, name, None) is not flowers:
            raise SystemExit(
                "this version of Flower runs tasks in another way, so approvals cannot be enforced: install flwr 1.41"
            )
        setattr(run_clientapp, name, ours)
    # the modules loaded here are the installed ones; the task must load the bundle's
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]
    flwr_clientapp()


if __name__ == "__main__":
    main()
