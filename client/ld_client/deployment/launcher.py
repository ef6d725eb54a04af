"""Starts one task of the study's code in place of `flwr-clientapp`, and looks at the very bytes that came.

    LD_TASK_TOKEN=... python -m ld_client.deployment.launcher HOME --runtime-api-address ... (as flwr-clientapp)

Started by `ld_client.deployment.executor` from the installed package. Three things of Flower's own command are
otherwise: the bundle that comes is hashed here and must be the approved one, whatever the executor was told; it is
unpacked afresh, as Flower takes a folder that is there for whole; and what goes wrong before the site's own wall leaves
without its text.
The token comes by the environment, which other accounts cannot read, not on the command line.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from flwr.app.error import Error
from flwr.cli.install import install_from_fab
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
from flwr.supernode.runtime import run_clientapp

import ld_common.core.offline  # noqa: F401  (before Flower)
from ld_client.deployment.approvals import check_bundle
from ld_client.deployment.site_home import SiteHome
from ld_common.protocol.code_bundle import PACKAGES

TOKEN = "LD_TASK_TOKEN"
SILENT = "the site failed for a reason that stays at the site"


def approved_install(home: SiteHome) -> Any:
    """Flower's unpacking of a bundle, for those that were approved at a site."""

    def install(fab: bytes, *arguments: Any, **options: Any) -> Any:
        check_bundle(home, hashlib.sha256(fab).hexdigest())
        shutil.rmtree(home.path / "flower" / "apps", ignore_errors=True)
        return install_from_fab(fab, *arguments, **options)

    return install


def silent_error(code: int, reason: str | None = None) -> Error:
    """An error for the server: its code, and a fixed sentence for its reason."""
    return Error(code=code, reason=SILENT)


def main() -> None:
    """Run one task."""
    home = SiteHome(Path(sys.argv.pop(1)))
    sys.argv += ["--token", os.environ.pop(TOKEN)]
    if run_clientapp.install_from_fab is not install_from_fab or run_clientapp.Error is not Error:
        raise SystemExit("this version of Flower runs tasks in another way: approvals would not hold")
    run_clientapp.install_from_fab = approved_install(home)
    run_clientapp.Error = silent_error
    # what is loaded here is the installed package; the task's code is the bundle's
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]
    flwr_clientapp()


if __name__ == "__main__":
    main()
