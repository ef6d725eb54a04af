"""Runs one task in place of `flwr-clientapp`, and checks the bytes of the bundle that came.

    LD_TASK_TOKEN=... python -m ld_client.deployment.launcher HOME --runtime-api-address ... (as flwr-clientapp)

`ld_client.deployment.executor` starts it from the installed package. Flower's command differs in three ways: here the
bundle is hashed here and must be the approved one; it is unpacked again each time, as Flower trusts an existing folder;
and an error before the ClientApp's own handler leaves without its text. The ClientApp then limits the process to
approved packages (`allow_approved_packages`). The token comes in the environment, which other accounts cannot read.
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
FIXED_REASON = "the site failed for a reason that stays at the site"


def approved_install(home: SiteHome) -> Any:
    """Flower's function that unpacks a bundle, restricted to approved bundles."""

    def install(fab: bytes, *arguments: Any, **options: Any) -> Any:
        check_bundle(home, hashlib.sha256(fab).hexdigest())
        shutil.rmtree(home.path / "flower" / "apps", ignore_errors=True)
        return install_from_fab(fab, *arguments, **options)

    return install


def silent_error(code: int, reason: str | None = None) -> Error:
    """An error with its code and a fixed sentence in place of its text."""
    return Error(code=code, reason=FIXED_REASON)


def main() -> None:
    """Run one task."""
    home = SiteHome(Path(sys.argv.pop(1)))
    sys.argv += ["--token", os.environ.pop(TOKEN)]
    if run_clientapp.install_from_fab is not install_from_fab or run_clientapp.Error is not Error:
        raise SystemExit(
            "this version of Flower runs tasks in another way, so approvals cannot be enforced: install flwr 1.41"
        )
    run_clientapp.install_from_fab = approved_install(home)
    run_clientapp.Error = silent_error
    # the modules loaded here are the installed ones; the task must load the bundle's
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]
    flwr_clientapp()


if __name__ == "__main__":
    main()
