"""Runs one task in place of `flwr-clientapp`, and checks the bytes of the bundle that came.

    LD_TASK_TOKEN=... python -m ld_client.deployment.launcher HOME --runtime-api-address ... (as flwr-clientapp)

`ld_client.deployment.executor` starts it from the installed package. Flower's command differs in three ways: here the
bundle is hashed here and must be the approved one; its code is loaded from the folder to which this process unpacked
it, where Flower builds a path of the server's words; and an error before the ClientApp's own handler leaves without its
text. The ClientApp then limits the process to approved packages (`allow_approved_packages`). The token comes in the
environment, which other accounts cannot read.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def main() -> None:
    """Run one task."""
    home = SiteHome(Path(sys.argv.pop(1)))
    sys.argv += ["--token", os.environ.pop(TOKEN)]
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
